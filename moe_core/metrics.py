"""What every step says about itself, written by rank 0 as a JSON line and to the run's trackers."""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .saving import STORAGE_ERRORS
from .trackers import Tracker

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Appends records to a run folder's metrics.jsonl and hands single numbers to trackers. Only rank 0 makes one.

    done: steps done before. Records past them, from a run that went further than its last checkpoint, go;
    with 0 the run starts anew. A tracker that fails is left out from then on, with its traceback in the rank's log.
    lost: records for which a full or failing disk had no room; all others are whole lines.
    """

    def __init__(self, run_dir: Path, done: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        path, self.lost = run_dir / METRICS, 0
        kept = [record for record in read_metrics(run_dir) if record["step"] <= done]
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        fresh.replace(path)  # at no moment is there less than what was kept
        self._lines = path.open("ab", buffering=0)
        self._trackers = list(trackers)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """One line, flushed, so that whoever follows the file sees whole steps.

        record: numbers, lists of numbers and mappings of those. Numbers that are not finite are written as
        text, so that every line is JSON; trackers get single numbers, "a/b" for the key b of a mapping a.
        """
        self._append((json.dumps(_finite({"step": step, **record})) + "\n").encode())
        scalars = dict(_scalars(record))
        self._tell(lambda tracker: tracker.write(step, scalars))

    def close(self) -> None:
        self._lines.close()
        self._tell(lambda tracker: tracker.close())

    def _append(self, line: bytes) -> None:
        before = self._lines.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._lines.write(line) or 0 :]
        except OSError as error:
            if error.errno not in STORAGE_ERRORS:
                raise
            self._lines.truncate(before)
            self.lost += 1

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception:
                self._trackers.remove(tracker)
                traceback.print_exc()


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
