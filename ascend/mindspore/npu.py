"""Backend `ascend`: MindSpore in PyNative mode on NPUs, HCCL as transport."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from .. import hccl
from . import runtime

_PARTS = {"ops": ".npu_ops", "comm": ".hccl_comm", "trainer": ".npu_trainer"}


def probe() -> runtime.Probe:
    """(available, reason, versions); touches the device only where a device node exists."""
    return runtime.probe_npu()


def device_count() -> int:
    """NPUs that this process may use."""
    return runtime.device_count()


def worker_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Variables that HCCL reads when it starts."""
    return hccl.environment(hccl.HcclSettings(**settings))


def explained(message: str) -> str | None:
    """What an error code of HCCL or of the NPU in a message means; None without one."""
    return hccl.explained(message)


def communicator_bytes(groups: Sequence[tuple[int, ...]], environment: Mapping[str, str]) -> int:
    """Device memory of HCCL's communicators: one for the job, and one that all groups of the same ranks share."""
    return hccl.memory_of_groups(1 + len(set(groups)) if groups else 0, environment)


def __getattr__(name: str) -> ModuleType:
    """The parts, imported when first asked for: `probe` must work where MindSpore is absent."""
    if name not in _PARTS:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    return importlib.import_module(_PARTS[name], __package__)
