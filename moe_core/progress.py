"""A run as its user sees it: one live line on a terminal, plain lines elsewhere, a few lines at the end.

Only the process that the user started prints; it follows the run folder's metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .metrics import METRICS

_QUIET_S = 2.0  # at most one plain line in so many seconds


class Follower:
    """Reads the records that appear in a growing metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._offset, self._rest = path, 0, 0, b""

    def new_records(self) -> list[dict[str, Any]]:
        """Whole lines since the last call; starts over with another file of that name, which a resumed run makes."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as lines:
            file = os.fstat(lines.fileno()).st_ino
            if file != self._file:
                self._file, self._offset, self._rest = file, 0, b""
            lines.seek(self._offset)
            text = self._rest + lines.read()
            self._offset = lines.tell()
        *whole, self._rest = text.split(b"\n")
        return [json.loads(line) for line in whole if line]


class RunView:
    """`launch.Watcher` of a training run."""

    def __init__(self, run_dir: Path, steps: int, console: Console) -> None:
        self._follower = Follower(run_dir / METRICS)
        self._console, self._steps = console, steps
        self._quiet_until, self._started = 0.0, time.monotonic()
        self._bar = _bar(console) if console.is_terminal else None
        self._task = self._bar.add_task("starting", total=steps) if self._bar else None

    def __enter__(self) -> RunView:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def poll(self) -> None:
        """Show what is new."""
        records = self._follower.new_records()
        for record in records:
            for told in record.get("warnings", []):
                self._console.print(f"warning: {told}", highlight=False, soft_wrap=True)
            if "validation_loss" in record:
                self._console.print(f"step {record['step']}: validation loss {_number(record['validation_loss'])}")
        if not records:
            return
        last = records[-1]
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=last["step"], description=line(last, self._steps))
        elif time.monotonic() >= self._quiet_until or last["step"] >= self._steps:
            self._console.print(line(last, self._steps), highlight=False, soft_wrap=True)
            self._quiet_until = time.monotonic() + _QUIET_S


def line(record: Mapping[str, Any], steps: int) -> str:
    """One step in one line."""
    told = [f"step {record['step']}/{steps}", f"loss {_number(record.get('loss'))}"]
    if "tokens_per_second" in record:
        told.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if "expert_imbalance" in record:
        told.append(f"load imbalance {record['expert_imbalance']:.2f}")
    return "  ".join(told)


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The end of a run in a few lines."""
    first, last = _number(summary.get("loss_first")), _number(summary.get("loss_last"))
    lines = [
        f"loss {first} -> {last} in {summary['steps']} steps, "
        f"{summary['tokens_per_second']:,.0f} tokens/s on {summary['world_size']} ranks ({summary['backend']})"
    ]
    if summary.get("validation_loss") is not None:
        beside = summary.get("bigram_loss")
        bigram = "" if beside is None else f"; byte bigram model fitted on the same data: {_number(beside)}"
        lines.append(f"validation loss {_number(summary['validation_loss'])} per token{bigram}")
    lines.append(f"peak memory {summary['peak_memory_bytes'] / 2**20:,.0f} MiB a rank; run folder {summary['run_dir']}")
    lines += (summary.get("resumed") or {}).get("notes", [])
    lines += [f"warning: {told}" for told in summary.get("late_warnings", [])]
    if summary.get("stopped_early"):
        lines.append("stopped early on request; continue with --resume auto")
    return lines


def _bar(console: Console) -> Progress:
    return Progress(BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), console=console)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
