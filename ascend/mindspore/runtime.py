"""What this machine has (versions, refusals) and the one place that sets MindSpore's device."""

from __future__ import annotations

import glob
import importlib.metadata
from collections.abc import Mapping

Probe = tuple[bool, str, dict[str, str]]

NUMPY_PIN = "numpy==1.26.4"
DEVICE_NODES = "/dev/davinci[0-9]*"


def versions(*packages: str) -> dict[str, str]:
    """Installed version of each package; absent ones are left out."""
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def missing(found: Mapping[str, str], *packages: str) -> str:
    """Why these installed versions can't work, or an empty string."""
    for package in packages:
        if package not in found:
            return f"{package} is not installed"
    if int(found["numpy"].split(".")[0]) >= 2:
        return (
            f"MindSpore needs numpy < 2 and {found['numpy']} is installed "
            f"(the import succeeds, tensors fail later); pip install {NUMPY_PIN}"
        )
    return ""


def probe_host() -> Probe:
    """Whether MindSpore can compute on the host with gloo as transport. Imports no framework."""
    found = versions("mindspore", "torch", "numpy")
    reason = missing(found, "mindspore", "torch", "numpy")
    return (False, reason, found) if reason else (True, "MindSpore on the host, gloo", found)


def probe_npu() -> Probe:
    """Whether MindSpore finds an Ascend device; imports MindSpore only where a device node exists."""
    found = versions("mindspore", "numpy")
    reason = missing(found, "mindspore", "numpy")
    if reason:
        return False, reason, found
    if not glob.glob(DEVICE_NODES):
        return False, f"no Ascend NPU on this machine ({DEVICE_NODES} does not exist)", found
    count = device_count()
    if not count:
        return False, "MindSpore can't use the NPU: install the driver and CANN and source CANN's set_env.sh", found
    return True, f"{count} Ascend NPUs", found


def device_count() -> int:
    """Ascend devices that MindSpore can use."""
    from mindspore.device_context import ascend

    return ascend.device_count() if ascend.is_available() else 0


def use_host() -> None:
    """Compute on the host, operator by operator.

    Launching in the calling thread makes small operators about ten times as fast here (no hand-over between
    threads) and lets an error appear where it is caused.
    """
    import mindspore as ms

    ms.set_device("CPU")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.runtime.launch_blocking()


def use_npu(index: int = 0, deterministic: bool = True) -> None:
    """Compute on one of the NPUs that this process sees. Deterministic kernels must be chosen before communication."""
    import mindspore as ms

    ms.set_device("Ascend", index)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    if deterministic:
        ms.set_deterministic(True)
