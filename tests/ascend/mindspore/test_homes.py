"""The two homes: what `probe` says, and that asking costs no framework."""

from __future__ import annotations

import subprocess
import sys

import pytest
from twinmoe.ascend.mindspore import cpu, npu, runtime

INSTALLED = {"mindspore": "2.10.0", "torch": "2.13.0", "numpy": "1.26.4"}


@pytest.mark.parametrize("home", ["cpu", "npu"])
def test_probing_imports_no_framework(home: str) -> None:
    script = (
        f"import sys; from twinmoe.ascend.mindspore import {home}; found = {home}.probe(); "
        "assert not {'mindspore', 'torch'} & set(sys.modules), 'imported'; print(len(found))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "3", done.stderr


def test_numpy_2_is_refused_with_the_pin() -> None:
    reason = runtime.missing(INSTALLED | {"numpy": "2.4.6"}, "mindspore", "numpy")
    assert reason.endswith("pip install numpy==1.26.4")
    assert "2.4.6" in reason


def test_an_absent_package_is_named() -> None:
    assert runtime.missing({"numpy": "1.26.4"}, "mindspore", "numpy") == "mindspore is not installed"
    assert runtime.missing(INSTALLED, "mindspore", "torch", "numpy") == ""


def test_no_device_node_means_no_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "versions", lambda *names: {n: INSTALLED[n] for n in names})
    monkeypatch.setattr(runtime, "DEVICE_NODES", "/nowhere/davinci[0-9]*")
    available, reason, versions = npu.probe()
    assert not available
    assert "no Ascend NPU" in reason
    assert versions["mindspore"] == "2.10.0"


def test_unknown_attributes_are_attribute_errors() -> None:
    for home in (cpu, npu):
        with pytest.raises(AttributeError, match="has no attribute 'kernels'"):
            home.kernels  # noqa: B018
