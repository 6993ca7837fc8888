"""What the charts of a report are drawn from: a run's records, thinned out to what a screen can show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from .compare_figures import RunFolder, bytes_by_level

POINTS, PERIODS = 800, 24
"""Most points of a curve, and most periods that maps of load are cut into; each is a mean over its steps."""

CURVES = ("loss", "grad_norm", "learning_rate", "rank_imbalance", "local_share", "drop_rate", "dead_experts")

Record = Mapping[str, Any]


def chart_data(run: RunFolder, label: str) -> dict[str, Any]:
    """One run, of JSON's types; a key is empty where the run has no such numbers."""
    records = run.records
    return {
        "label": label,
        "scheme": run.config.parallel.scheme,
        "steps": len(records),
        "ranks": run.ranks,
        "x": _axes(records),
        "curves": {name: _thinned([_number(r.get(name)) for r in records]) for name in CURVES},
        "memory": _thinned([_number(r.get("peak_memory_bytes")) for r in records]),
        "validation": _validation(run),
        "bigram": _number(run.summary.get("bigram_loss")),
        "phases": _phases(records),
        "bytes": bytes_by_level(run),
        "experts": experts(records),
        "rank_load": rank_load(records),
    }


def _axes(records: Sequence[Record]) -> dict[str, list[float | None]]:
    """What curves can be drawn over: steps, tokens seen, seconds in steps."""
    tokens = np.cumsum([r.get("tokens", 0) for r in records]).tolist()
    seconds = np.cumsum([r.get("seconds", 0.0) for r in records]).tolist()
    steps = [float(r["step"]) for r in records]
    return {"steps": _thinned(steps), "tokens": _thinned(tokens), "seconds": _thinned(seconds)}


def _validation(run: RunFolder) -> dict[str, list[float]]:
    """Validation losses with where they were taken; the last one stands in the summary."""
    found: dict[str, list[float]] = {"steps": [], "tokens": [], "seconds": [], "loss": []}
    tokens = seconds = 0.0
    for record in run.records:
        tokens, seconds = tokens + record.get("tokens", 0), seconds + record.get("seconds", 0.0)
        last = record is run.records[-1]
        loss = _number(record.get("validation_loss", run.summary.get("validation_loss") if last else None))
        if loss is not None:
            for name, value in (("steps", record["step"]), ("tokens", tokens), ("seconds", seconds), ("loss", loss)):
                found[name].append(float(value))
    return found


def _phases(records: Sequence[Record]) -> dict[str, float]:
    """Mean seconds of a step by phase; what no phase claims is `other`. The first steps are left out."""
    timed = [r for r in records[min(5, len(records) // 2) :] if "phases" in r]
    names = dict.fromkeys(name for r in timed for name in r["phases"])
    found = {name: fmean(r["phases"].get(name, 0.0) for r in timed) for name in names}
    if found:
        whole = fmean(r["seconds"] for r in timed)
        found["other"] = max(0.0, whole - sum(found.values()))
    return found


def experts(records: Sequence[Record]) -> dict[str, Any]:
    """Load of each expert over the mean of its layer by period, (periods, layers, experts); and each layer's most.

    Rows count after dropping; nothing where the run recorded none.
    """
    loads = [(r["step"], np.asarray(r["expert_load"], float)) for r in records if np.size(r.get("expert_load", ()))]
    if not loads:
        return {}
    periods = [_over_mean(np.sum([load for _, load in part], 0)) for part in _parts(loads)]
    return {
        "periods": [_period(part) for part in _parts(loads)],
        "load": [[[round(v, 3) for v in row] for row in period.tolist()] for period in periods],
        "most": np.round([period.max(1) for period in periods], 3).T.tolist(),
    }


def rank_load(records: Sequence[Record]) -> dict[str, Any]:
    """Expert rows of each rank over the mean of all ranks by period, (ranks, periods).

    A run that went on with other ranks has None where a rank was not there; a period counts those of its last step.
    """
    rows = [(r["step"], r["rows_per_rank"]) for r in records if r.get("rows_per_rank")]
    if not rows:
        return {}
    most = max(len(row) for _, row in rows)
    periods = []
    for part in _parts(rows):
        alike = [row for _, row in part if len(row) == len(part[-1][1])]
        load = _over_mean(np.sum(np.asarray(alike, float), 0)[None])[0]
        periods.append([*np.round(load, 3).tolist(), *[None] * (most - len(load))])
    return {"periods": [_period(part) for part in _parts(rows)], "load": [list(rank) for rank in zip(*periods)]}


def _period(part: Sequence[Any]) -> str:
    first, last = part[0][0], part[-1][0]
    return str(first) if first == last else f"{first}-{last}"


def _parts(items: Sequence[Any]) -> list[Sequence[Any]]:
    """At most PERIODS parts of equal length, but for the last."""
    size = -(-len(items) // PERIODS)
    return [items[first : first + size] for first in range(0, len(items), size)]


def _over_mean(load_LE: np.ndarray) -> np.ndarray:
    return load_LE / np.maximum(load_LE.mean(1, keepdims=True), 1e-30)


def _thinned(values: Sequence[float | None]) -> list[float | None]:
    """Means of as many values each as leave at most POINTS; a point of which nothing is known is None."""
    size = max(1, math.ceil(len(values) / POINTS))
    if size == 1:
        return list(values)
    parts = (values[first : first + size] for first in range(0, len(values), size))
    known = ([v for v in part if v is not None] for part in parts)
    return [fmean(part) if part else None for part in known]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
