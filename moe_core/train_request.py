"""What `twinmoe train` was asked, checked; then start its workers, or join the job that a launcher made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..backends.registry import Choice, choose, launcher_name, load, probe, read_launch, surrounding_launcher
from .combinations import ConfigError, check_ranks, check_trainable
from .compose import command_line_backend, load_config
from .config import Config
from .launch import Job, JobFailedError, check_local, free_port, run_job
from .progress import RunView
from .run_folder import CONFIG, SUMMARY, default_run_dir, open_run_folder
from .scheme_auto import advice_line, settled
from .trackers import check_trackers
from .worker import Order, train_rank

AUTO = "auto"
_HOST_RANKS = 4  # where ranks share the host


@dataclass(frozen=True)
class TrainRequest:
    """The command line of `train`."""

    config: str
    overrides: tuple[str, ...] = ()
    nproc: str = AUTO
    run_dir: Path | None = None
    resume: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class Resolved:
    """A request after every check that needs no process. notes: why `scheme: auto` became what it is."""

    config: Config
    choice: Choice
    ranks: int
    run_dir: Path
    resume: str | None
    port: int | None
    notes: tuple[str, ...] = ()

    @property
    def order(self) -> Order:
        return Order("train", self.run_dir, self.choice.name, self.choice.decided_by, {"resume": self.resume})

    def start_line(self) -> str:
        """Which backend runs, who decided it and why; how many ranks; which scheme."""
        backend = f"{self.choice.name} (decided by {self.choice.decided_by}: {self.choice.reason})"
        return (
            f"{self.config.name} on {backend}, {self.ranks} ranks, scheme {self.config.parallel.scheme}, {self.run_dir}"
        )


def read_request(request: TrainRequest) -> tuple[Config, Choice, int]:
    """Config, backend and number of ranks. Raises ConfigError or BackendError with one sentence."""
    config = load_config(request.config, request.overrides)
    named = command_line_backend(request.overrides)
    choice = choose(named, config.backend if named is None else None)
    ranks = read_launch().size if surrounding_launcher() else rank_count(request.nproc, choice.name)
    check_ranks(config, ranks)
    return config, choice, ranks


def resolve(request: TrainRequest) -> Resolved:
    """Check everything that can be checked before a process is started, and settle the run folder."""
    config, choice, ranks = read_request(request)
    check_trainable(config)
    if not surrounding_launcher():
        check_local(ranks)
    check_trackers(config.train.trackers)
    run_dir = _run_dir(request, config)
    done = settled(config, ranks, run_dir if request.resume is not None else None)
    return Resolved(done.config, choice, ranks, run_dir, request.resume, request.port, done.reasons)


def rank_count(nproc: str, backend: str) -> int:
    """--nproc as a number: auto is one rank a device, or four where ranks share the host."""
    devices = probe(backend).devices
    if nproc == AUTO:
        return devices or _HOST_RANKS
    if not nproc.isdecimal() or int(nproc) < 1:
        raise ConfigError(f"--nproc {nproc} is neither a positive number nor auto; for example --nproc 4")
    if devices is not None and int(nproc) > devices:
        raise ConfigError(
            f"--nproc {nproc} is more than the {devices} devices that {backend} has here; "
            f"use --nproc {devices}, or backend=cpu where ranks share the host"
        )
    return int(nproc)


def start(resolved: Resolved, console: Console) -> dict[str, Any]:
    """Train with local workers of our own, or as one rank of the job that a launcher made. Returns the summary.

    Raises JobFailedError when workers fail.
    """
    if surrounding_launcher():
        return _join(resolved, console)
    port = free_port(resolved.port)
    made = [folder for folder in (resolved.run_dir, *resolved.run_dir.parents) if not folder.exists()]
    open_run_folder(resolved.run_dir, resolved.config, resolved.resume is not None)
    told = resolved.config.communication.model_dump()
    job = Job(resolved.order, resolved.ranks, launcher_name(resolved.choice.name), port, told)
    for line in (resolved.start_line(), *resolved.notes):
        console.print(line, highlight=False, soft_wrap=True)
    try:
        with RunView(resolved.run_dir, resolved.config.train.steps, console) as view:
            summary = run_job(job, view)
    except JobFailedError as error:
        if error.request:
            _take_back(made)
        raise
    advice = advice_line(resolved.config, resolved.ranks, resolved.run_dir) if resolved.notes else None
    if advice is not None:
        console.print(advice, highlight=False, soft_wrap=True)
    return summary


def _take_back(made: Sequence[Path]) -> None:
    """Remove a run folder that a wrong request made, and the folders above it that hold nothing else."""
    for number, folder in enumerate(made):
        if number == 0:
            shutil.rmtree(folder, ignore_errors=True)
        elif not any(folder.iterdir()):
            folder.rmdir()


def _join(resolved: Resolved, console: Console) -> dict[str, Any]:
    launch = read_launch()
    if launch.rank == 0:
        open_run_folder(resolved.run_dir, resolved.config, resolved.resume is not None)
        for line in (resolved.start_line(), *resolved.notes):
            console.print(line, highlight=False, soft_wrap=True)
    backend = load(resolved.choice.name, resolved.choice.decided_by)
    summary = train_rank(resolved.config, resolved.order, backend, launch)
    if launch.rank == 0:
        (resolved.run_dir / SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
    return {**summary, "rank": launch.rank}


def _run_dir(request: TrainRequest, config: Config) -> Path:
    if request.run_dir is not None:
        return request.run_dir
    if surrounding_launcher():
        raise ConfigError("a launcher started several ranks, which must agree on the run folder; give --run-dir")
    if request.resume == AUTO:
        return _newest(config)
    if request.resume is not None and (Path(request.resume) / CONFIG).exists():
        return Path(request.resume)
    return default_run_dir(config)


def _newest(config: Config) -> Path:
    runs = [path.parent for path in Path("runs").glob(f"{config.name}-*/latest")]
    if not runs:
        raise ConfigError(
            f"there is no run of {config.name} with a checkpoint under runs/; name its folder with --run-dir"
        )
    return max(runs, key=lambda path: (path / "latest").stat().st_mtime)
