"""What `twinmoe verify` was asked: one job of real processes for every backend and number of ranks, then one report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..backends.registry import choose, launcher_name, probe
from .bits import differing
from .combinations import ConfigError
from .launch import Job, check_local, free_port, run_job
from .run_folder import LOGS
from .verify import TOLERANCE, VerifyLevel, merge
from .worker import Order


@dataclass(frozen=True)
class VerifyRequest:
    """The command line of `verify`. backends empty: the one that `train` would take; deterministic: every job is run
    once more, in new processes, and must give the same bits."""

    level: str = "standard"
    worlds: str = "2,4"
    backends: tuple[str, ...] = ()
    dtype: str = "float64"
    deterministic: bool = False


class _Silent:
    def poll(self) -> None:
        """Nothing is shown while cases run."""


def verify(request: VerifyRequest) -> dict[str, Any]:
    """The JSON of `verify`. Raises ConfigError, BackendError, JobFailedError."""
    if request.level not in get_args(VerifyLevel):
        raise ConfigError(f"--level {request.level} is unknown; choose one of {', '.join(get_args(VerifyLevel))}")
    if request.dtype not in TOLERANCE:
        raise ConfigError(f"--dtype {request.dtype} is unknown; choose one of {', '.join(TOLERANCE)}")
    options = {"level": request.level, "dtype": request.dtype}
    jobs = list(_jobs(request))
    parts = [_run(*job, options) for job in jobs]
    report = {**merge(parts), "backends": sorted({name for part in parts for name in part["backends"]})}
    if request.deterministic:
        report["differing"] = [told for job, part in zip(jobs, parts) for told in _differing(job, part, options)]
    return report


def _differing(job: tuple[str, str, int], first: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    backend, _, ranks = job
    names = differing(first["bits"], _run(*job, options)["bits"])
    return [f"{backend}, world {ranks}: {name}" for name in names]


def lines(report: Mapping[str, Any]) -> list[str]:
    """What people read: every failure, then the sum."""
    failures = [
        f"world {f['world']}: {f['case']}: {f['where']} differs by {f['error']:.3g}" for f in report["failures"]
    ]
    ranks = ", ".join(map(str, report["world_sizes"]))
    total = f"{report['passed']} of {report['cases']} cases equal the oracle on {', '.join(report['backends'])}"
    told = [*failures, f"{total}, {ranks} ranks; worst relative error {report['worst_relative_error']:.2e}"]
    if "differing" in report:
        told += [f"{name}: a second run gave other bits" for name in report["differing"]]
        told.append(f"{report['cases'] - len(report['differing'])} of {report['cases']} cases gave the same bits twice")
    return told


def _jobs(request: VerifyRequest) -> Iterator[tuple[str, str, int]]:
    worlds = [_world(text) for text in request.worlds.split(",")]
    for name in request.backends or (None,):
        choice = choose(name)
        devices = probe(choice.name).devices
        for ranks in worlds:
            if devices is not None and ranks > devices:
                raise ConfigError(
                    f"--worlds {ranks} is more than the {devices} devices that {choice.name} has here; "
                    f"use at most {devices}"
                )
            yield choice.name, choice.decided_by, ranks


def _world(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ConfigError(f"--worlds {text!r} is not a number of processes; for example --worlds 2,4")
    return check_local(int(text))


def _run(backend: str, decided_by: str, ranks: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """One job; its logs stay if it fails."""
    folder = Path(tempfile.mkdtemp(prefix="twinmoe_verify_"))
    (folder / LOGS).mkdir()
    order = Order("verify", folder, backend, decided_by, options)
    report = run_job(Job(order, ranks, launcher_name(backend), free_port()), _Silent())
    shutil.rmtree(folder, ignore_errors=True)
    return report
