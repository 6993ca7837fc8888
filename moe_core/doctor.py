"""What works here: every backend with its versions, or why not and what to install."""

from __future__ import annotations

from typing import Any

from ..backends.registry import HOMES, BackendError, choose, fitting_extra, probe_all
from .run_folder import library_versions


def examine() -> dict[str, Any]:
    """The JSON of `doctor`. `extra`: what this machine's devices ask to install, as `twinmoe[extra]`."""
    found = probe_all()
    backends = {
        name: {
            "available": probe.available,
            "reason": probe.reason,
            "versions": dict(probe.versions),
            "devices": probe.devices,
            "remedy": None if probe.available else HOMES[name].remedy,
        }
        for name, probe in found.items()
    }
    common = {"backends": backends, "versions": library_versions(), "extra": fitting_extra()}
    try:
        choice = choose()
    except BackendError as error:
        return {"chosen": None, "decided_by": "nothing works", "why": str(error), **common}
    return {"chosen": choice.name, "decided_by": choice.decided_by, "why": choice.reason, **common}


def lines(report: dict[str, Any]) -> list[str]:
    """One line a backend, then what would be chosen and why."""
    told = []
    for name, backend in report["backends"].items():
        works = "works" if backend["available"] else "no"
        remedy = f"; {backend['remedy']}" if backend["remedy"] else ""
        versions = ", ".join(f"{library} {version}" for library, version in backend["versions"].items())
        told.append(f"{name:14} {works:6} {backend['reason']}{remedy}{f' ({versions})' if versions else ''}")
    return [*told, f"would run: {report['chosen']} (decided by {report['decided_by']}: {report['why']})"]
