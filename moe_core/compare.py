"""`twinmoe compare`: one experiment under several schemes and seeds, each a training run of its own.

Seeds are the outer loop, so that what disturbs the machine for a while disturbs every scheme. Runs that are in the
folder already are taken as they are, so a comparison that was interrupted goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from ..backends.registry import surrounding_launcher
from .combinations import ConfigError
from .compare_figures import RunFolder, bytes_by_level, figures, read_run
from .compose import load_config
from .launch import JobFailedError
from .run_folder import CONFIG, SUMMARY, model_hash
from .train_request import Resolved, TrainRequest, resolve, start

FAILED = "failed"
UNLIKE: Mapping[str, str] = {
    "model_hash": "another model",
    "data_hash": "other data",
    "steps": "other steps",
    "ranks": "other ranks",
    "backend": "another backend",
}
"""What must be the same for two rows to be read beside each other -> the mark of a row where it is not."""


@dataclass(frozen=True)
class CompareRequest:
    """schemes: names, each followed by its own settings, as in ("llep", "least_loaded.min_rows=64", "ep").

    beside: finished runs that are tabulated too, a row each.
    """

    config: str
    overrides: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ("ep",)
    seeds: int = 1
    nproc: str = "auto"
    run_dir: Path = Path("runs/compare")
    peak_tflops: float | None = None
    beside: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One row of the table: the runs of a scheme, one a seed."""

    name: str
    words: tuple[str, ...]

    def folder(self, run_dir: Path, seed: int) -> Path:
        safe = "".join(c if c.isalnum() or c in "-._" else "_" for c in self.name)
        return run_dir / f"{safe}-seed{seed}"


def entries(schemes: Sequence[str]) -> list[Entry]:
    """Names and the settings behind them (keys of `parallel` without the prefix). ConfigError where none is named."""
    found: list[tuple[str, list[str]]] = []
    for word in schemes:
        if "=" not in word:
            found.append((word, []))
        elif not found:
            raise ConfigError(f"--schemes begins with {word!r}; name the scheme that it belongs to, as in ep,{word}")
        else:
            found[-1][1].append(word)
    made = [
        Entry(",".join([name, *settings]), (f"parallel.scheme={name}", *map(_in_full, settings)))
        for name, settings in found
    ]
    if len({entry.name for entry in made}) < len(made) or not made:
        raise ConfigError("--schemes must name each scheme once; for example --schemes ep,llep")
    return made


def _in_full(setting: str) -> str:
    sections = ("parallel.", "moe.", "model.", "train.", "data.", "cluster.", "communication.")
    return setting if setting.startswith(sections) else f"parallel.{setting}"


def run(request: CompareRequest, console: Console) -> dict[str, Any]:
    """The JSON of `compare`: rows with mean and spread over seeds. ConfigError before anything starts."""
    if surrounding_launcher():
        raise ConfigError("compare starts its own jobs; run it without a launcher, or `train` under one per run")
    if request.peak_tflops is not None and not (math.isfinite(request.peak_tflops) and request.peak_tflops > 0):
        raise ConfigError(f"--peak-tflops {request.peak_tflops:g} is not the speed of a device; give one above 0")
    rows = entries(request.schemes)
    beside = [read_run(path) for path in request.beside]
    work = [(row, job) for job, row in _jobs(request, rows)]
    failures: dict[str, list[str]] = {}
    for row, job in work:
        told = _made(job, console)
        failures.setdefault(row.name, []).extend([told] if told else [])
    runs = {
        row.name: [read_run(job.run_dir) for other, job in work if other is row and (job.run_dir / SUMMARY).exists()]
        for row in rows
    }
    table = [scheme_row(name, found, request.peak_tflops, failures[name]) for name, found in runs.items()]
    table += [scheme_row(str(other.path), [other], request.peak_tflops, []) for other in beside]
    return {"config": request.config, "seeds": request.seeds, "rows": marked(table)}


def _jobs(request: CompareRequest, rows: Sequence[Entry]) -> Iterator[tuple[Resolved, Entry]]:
    first = load_config(request.config, request.overrides).train.seed
    for seed in range(first, first + request.seeds):
        for row in rows:
            words = (*request.overrides, *row.words, f"train.seed={seed}")
            folder = row.folder(request.run_dir, seed)
            resume = "auto" if (folder / CONFIG).exists() else None
            job = resolve(TrainRequest(request.config, words, request.nproc, folder, resume))
            if resume and read_run(folder).config != job.config:
                raise ConfigError(f"{folder} holds a run of another config; choose another --run-dir")
            yield job, row


def _made(job: Resolved, console: Console) -> str | None:
    """Make the run, if its folder does not hold it already; what went wrong, if something did."""
    if (job.run_dir / SUMMARY).exists() and not read_run(job.run_dir).summary.get("stopped_early"):
        return None
    try:
        summary = start(job, console)
    except JobFailedError as error:
        if error.request:
            raise
        console.print(f"{job.run_dir} failed: {str(error).splitlines()[0]}", highlight=False, soft_wrap=True)
        return f"{job.run_dir.name}: {str(error).strip().splitlines()[-1]}"
    if summary.get("stopped_early"):
        raise JobFailedError("stopped on request; the same command goes on from here")
    return None


def scheme_row(scheme: str, runs: Sequence[RunFolder], peak: float | None, failures: Sequence[str]) -> dict[str, Any]:
    """Mean and spread (sample standard deviation; None of one run) of each figure."""
    each = [figures(run, peak) for run in runs]
    levels = [bytes_by_level(run) for run in runs]
    names = dict.fromkeys(level for found in levels for level in found)
    row: dict[str, Any] = {
        "scheme": scheme,
        "runs": len(runs),
        "model_hash": _common([run.hashes[0] or model_hash(run.config) for run in runs]),
        "data_hash": _common([run.hashes[1] for run in runs]),
        "backend": _common([run.environment.get("backend") for run in runs]),
        "ranks": _common([run.ranks for run in runs]),
        "steps": _common([len(run.summary.get("losses") or run.records) for run in runs]),
        "folders": [str(run.path) for run in runs],
        "failures": list(failures),
        "figures": {},
        "bytes_by_level": {name: fmean(found.get(name, 0.0) for found in levels) for name in names},
    }
    for figure in each[0] if each else ():
        values = [value for f in each if (value := f[figure]) is not None]
        spread = stdev(values) if len(values) > 1 else None
        mean = fmean(values) if len(values) == len(each) else None
        row["figures"][figure] = {"mean": mean, "spread": spread, "values": [f[figure] for f in each]}
    return row


def marked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each row with what makes it unlike the first one that has runs, and its speed-up.

    speed_up: tokens per second and device over the first row's, where all but the steps is the same; pairs of seeds.
    """
    base = next((row for row in rows if row["runs"]), None)
    found = []
    for row in rows:
        unlike = [name for name in UNLIKE if base is not None and (row[name] is None or row[name] != base[name])]
        marks = [UNLIKE[name] for name in unlike if row["runs"]] + [FAILED] * bool(row["failures"] or not row["runs"])
        speed_up = None if set(unlike) - {"steps"} else _speed_up(row, base)
        found.append({**row, "marks": marks, "speed_up": speed_up})
    return found


def _speed_up(row: Mapping[str, Any], base: Any) -> dict[str, float | None] | None:
    name = "tokens_per_second_per_device"
    if not row["runs"] or row["runs"] != base["runs"]:
        return None
    pairs = list(zip(row["figures"][name]["values"], base["figures"][name]["values"]))
    if any(not mine or not theirs for mine, theirs in pairs):
        return None
    ratios = [mine / theirs for mine, theirs in pairs]
    return {"mean": fmean(ratios), "spread": stdev(ratios) if len(ratios) > 1 else None}


def _common(values: Sequence[Any]) -> Any:
    """What all runs say; None if they differ or nobody says."""
    return values[0] if values and all(value == values[0] for value in values) else None
