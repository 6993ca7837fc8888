"""Backend `ascend-torch`: torch-npu on NPUs, HCCL as transport."""

from __future__ import annotations

import glob
import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from ...backends.registry import told_variables
from .. import hccl

DEVICE_NODES = "/dev/davinci[0-9]*"


def probe() -> tuple[bool, str, dict[str, str]]:
    """(available, reason, versions); imports torch-npu only where a device node exists."""
    found: dict[str, str] = {}
    for package in ("torch", "torch_npu", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return False, f"{package} is not installed", found
    if not glob.glob(DEVICE_NODES):
        return False, f"no Ascend NPU on this machine ({DEVICE_NODES} does not exist)", found
    try:
        count = device_count()
    except Exception as error:  # whatever its libraries raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return False, f"torch-npu does not load; install CANN and source its set_env.sh ({first})", found
    return (True, f"{count} Ascend NPUs", found) if count else (False, "torch-npu sees no NPU", found)


def device_count() -> int:
    """NPUs that this process may use."""
    return int(_load().npu.device_count())


def worker_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """What HCCL reads when it starts; torch-npu loaded by us alone, and an error where it lacks an operator.

    Left to itself torch loads it at every import, which fails where CANN is not set up, and an operator that is
    missing on the device is computed on the host without a word.
    """
    own = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "TORCH_NPU_FALLBACK_CPU_DISABLE": "1"}
    return hccl.environment(hccl.HcclSettings(**settings)) | own


def explained(message: str) -> str | None:
    """What an error code of HCCL or of the NPU in a message means; None without one."""
    return hccl.explained(message)


def communicator_bytes(groups: Sequence[tuple[int, ...]], environment: Mapping[str, str]) -> int:
    """Most device memory that HCCL's communicators take: one a group, made when it is first used."""
    return hccl.memory_of_groups(len(groups), environment)


def _load() -> Any:
    """torch with the device `npu`; its kernels deterministic, as HCCL, which must be chosen before the first."""
    torch: Any = importlib.import_module("torch")
    importlib.import_module("torch_npu")
    torch.use_deterministic_algorithms(hccl.is_deterministic(told_variables("HCCL_")), warn_only=True)
    return torch


def __getattr__(name: str) -> Any:
    """The parts, imported when first asked for: `probe` must work where torch-npu is absent."""
    if name not in ("ops", "comm", "trainer"):
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    _load()
    part: Any = importlib.import_module(f".{name}", __package__)
    return part.make() if name == "trainer" else part
