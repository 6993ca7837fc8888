"""The home of `ascend-torch` where there is no torch-npu, no NPU, or both."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys

import pytest
from twinmoe.ascend.torch_npu import backend


def test_probing_imports_no_framework() -> None:
    script = (
        "import sys; from twinmoe.ascend.torch_npu import backend; found = backend.probe(); "
        "assert 'torch' not in sys.modules; print(found[0])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0", "numpy": "1.26.4"}

    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert backend.probe() == (False, "torch_npu is not installed", {"torch": "2.13.0"})
    installed["torch_npu"] = "2.13.0"
    monkeypatch.setattr(backend, "DEVICE_NODES", "/nowhere/davinci[0-9]*")
    available, reason, versions = backend.probe()
    assert not available
    assert "no Ascend NPU" in reason
    assert versions == {"torch": "2.13.0", "torch_npu": "2.13.0", "numpy": "1.26.4"}


def test_a_library_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise ImportError("libhccl.so: no such file")

    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.13.0")
    monkeypatch.setattr(backend, "DEVICE_NODES", "/dev/null")
    monkeypatch.setattr(backend, "device_count", broken)
    available, reason, _ = backend.probe()
    assert not available
    assert reason == "torch-npu does not load; install CANN and source its set_env.sh (libhccl.so: no such file)"


def test_unknown_attributes_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'kernels_of_mine'"):
        backend.kernels_of_mine  # noqa: B018


@pytest.mark.parametrize(("told", "asked"), [("true", True), ("false", False), (None, True)])
def test_torch_is_asked_for_what_hccl_was_told(monkeypatch: pytest.MonkeyPatch, told: str | None, asked: bool) -> None:
    found: list[bool] = []

    class Torch:
        @staticmethod
        def use_deterministic_algorithms(mode: bool, warn_only: bool) -> None:
            found.append(mode)

    monkeypatch.delenv("HCCL_DETERMINISTIC", raising=False)
    if told is not None:
        monkeypatch.setenv("HCCL_DETERMINISTIC", told)
    monkeypatch.setattr(importlib, "import_module", lambda name: Torch)
    backend._load()
    assert found == [asked]
