"""What every step says about itself: one frozen record, written as a JSON line and to TensorBoard by rank 0."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class LayerLoad:
    """One MoE layer in one step, over all ranks. Counts of (token, expert) rows.

    experts: choices of each expert, before dropping. ranks: rows that each rank computed. local: share of kept
    rows that were computed where their token rests. dropped: share of choices that were not computed.
    """

    experts: Sequence[int]
    ranks: Sequence[int] = ()
    local: float = 1.0
    dropped: float = 0.0

    @property
    def imbalance(self) -> float:
        """Largest over mean load of an expert; 1 is even."""
        total = sum(self.experts)
        return max(self.experts) * len(self.experts) / total if total else 1.0

    @property
    def rank_imbalance(self) -> float:
        """Largest over mean load of a rank; 1 is even."""
        total = sum(self.ranks)
        return max(self.ranks) * len(self.ranks) / total if total else 1.0


@dataclass(frozen=True)
class StepRecord:
    """Everything a step reports. Losses and norms are those of the whole global batch; seconds are of rank 0.

    losses: auxiliary losses by name, before coefficients. seconds_by_phase: for example forward, backward,
    reduce, step, data. bytes_by_level: sent by all ranks over each level. validation: losses by domain and "all".
    extra: numbers of a scheme or router that has its own.
    """

    step: int
    loss: float
    cross_entropy: float
    tokens: int
    seconds: float
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    peak_memory_bytes: int = 0
    losses: Mapping[str, float] = field(default_factory=dict)
    seconds_by_phase: Mapping[str, float] = field(default_factory=dict)
    bytes_by_level: Mapping[str, int] = field(default_factory=dict)
    layers: Sequence[LayerLoad] = ()
    validation: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def load_imbalance(self) -> float:
        """Mean over layers of the largest over mean load of an expert."""
        return sum(layer.imbalance for layer in self.layers) / len(self.layers) if self.layers else 1.0

    def as_dict(self) -> dict[str, Any]:
        """The JSON line: all fields and the derived numbers; non-finite numbers as text, so that it stays JSON."""
        derived = {"tokens_per_second": self.tokens_per_second, "load_imbalance": self.load_imbalance}
        return _finite({**asdict(self), **derived})


class MetricsWriter:
    """Appends records to a run folder's metrics.jsonl and tensorboard/. Only rank 0 makes one.

    resume_from: steps done before; records past it, from a run that went further than its last checkpoint, go.
    """

    def __init__(self, run_dir: Path, resume_from: int | None = None) -> None:
        from tensorboard.summary import Writer  # costs 0.2 s, which only rank 0 of a run should pay

        path = run_dir / METRICS
        kept = [r for r in read_metrics(run_dir) if resume_from is not None and r["step"] <= resume_from]
        self._lines = path.open("w", encoding="utf-8")
        self._lines.writelines(json.dumps(record) + "\n" for record in kept)
        self._lines.flush()
        self._board = Writer(str(run_dir / "tensorboard"))

    def write(self, record: StepRecord) -> None:
        """One line, flushed, so that whoever follows the file sees whole steps."""
        self._lines.write(json.dumps(record.as_dict()) + "\n")
        self._lines.flush()
        for tag, value in _scalars(record):
            self._board.add_scalar(tag, value, record.step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run so far, in order; a last line that was cut short is left out."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _scalars(record: StepRecord) -> list[tuple[str, float]]:
    named = {
        "loss/total": record.loss,
        "loss/cross_entropy": record.cross_entropy,
        "train/learning_rate": record.learning_rate,
        "train/grad_norm": record.grad_norm,
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/seconds": record.seconds,
        "memory/peak_bytes": record.peak_memory_bytes,
        **{f"loss/{name}": value for name, value in record.losses.items()},
        **{f"seconds/{name}": value for name, value in record.seconds_by_phase.items()},
        **{f"bytes/{name}": value for name, value in record.bytes_by_level.items()},
        **{f"validation/{name}": value for name, value in record.validation.items()},
        **{f"extra/{name}": value for name, value in record.extra.items()},
    }
    for index, layer in enumerate(record.layers):
        named[f"load/imbalance_{index}"] = layer.imbalance
        named[f"load/rank_imbalance_{index}"] = layer.rank_imbalance
        named[f"load/local_{index}"] = layer.local
        named[f"load/dropped_{index}"] = layer.dropped
    return list(named.items())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
