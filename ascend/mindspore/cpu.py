"""Backend `mindspore-cpu`: the code of `ascend` on the host, with gloo in the same process as transport."""

from __future__ import annotations

import importlib
from types import ModuleType

from . import runtime

_PARTS = {"ops": ".host_ops", "comm": ".gloo_comm", "trainer": ".host_trainer"}


def probe() -> runtime.Probe:
    """(available, reason, versions); imports no framework."""
    return runtime.probe_host()


def __getattr__(name: str) -> ModuleType:
    """The parts, imported when first asked for: `probe` must work where MindSpore is absent."""
    if name not in _PARTS:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    runtime.use_host()
    return importlib.import_module(_PARTS[name], __package__)
