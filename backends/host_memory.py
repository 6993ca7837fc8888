"""Memory of this process as the operating system counts it (Linux; elsewhere the lifetime peak)."""

from __future__ import annotations

import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_resident(reset: bool = False) -> int:
    """Largest resident set in bytes since the last reset; `reset` starts a new measurement afterwards."""
    try:
        field = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        peak = int(field.split()[1]) * 1024
        if reset:
            _CLEAR.write_text("5")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak
