"""What every step says about itself, written by rank 0 as a JSON line and to TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Appends records to a run folder's metrics.jsonl and tensorboard/. Only rank 0 makes one.

    done: steps done before. Records past them, from a run that went further than its last checkpoint, go;
    with 0 the run starts anew.
    """

    def __init__(self, run_dir: Path, done: int = 0) -> None:
        from tensorboard.summary import Writer  # costs 0.2 s, which only rank 0 of a run should pay

        kept = [record for record in read_metrics(run_dir) if record["step"] <= done]
        self._lines = (run_dir / METRICS).open("w", encoding="utf-8")
        self._lines.writelines(json.dumps(record) + "\n" for record in kept)
        self._lines.flush()
        self._board = Writer(str(run_dir / "tensorboard"))

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """One line, flushed, so that whoever follows the file sees whole steps.

        record: numbers, lists of numbers and mappings of those. Numbers that are not finite are written as
        text, so that every line is JSON; TensorBoard gets single numbers, "a/b" for the key b of a mapping a.
        """
        self._lines.write(json.dumps(_finite({"step": step, **record})) + "\n")
        self._lines.flush()
        for tag, value in _scalars(record):
            self._board.add_scalar(tag, value, step)

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


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, float(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
