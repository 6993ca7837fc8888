"""Backend `mindspore-cpu`: the code of `ascend` on the host, with gloo in the same process as transport."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from . import runtime

_PARTS = {"ops": ".host_ops", "comm": ".gloo_comm", "trainer": ".host_trainer"}


def probe() -> runtime.Probe:
    """(available, reason, versions); imports no framework."""
    return runtime.probe_host()


def worker_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """The host's interface, where one is named."""
    interface = settings.get("network_interface")
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def __getattr__(name: str) -> ModuleType:
    """The parts, imported when first asked for: `probe` must work where MindSpore is absent."""
    if name not in _PARTS:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    runtime.use_host()
    return importlib.import_module(_PARTS[name], __package__)
