"""Where the figures of a run are shown besides its folder: TensorBoard, Weights & Biases, or a tracker of one's own.

A tracker has three methods. Its name in `train.trackers` is one of TRACKERS, or that of an entry point which an
installed package declares in the group `twinmoe.trackers`: a callable without arguments that makes one.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from .combinations import ConfigError

GROUP = "twinmoe.trackers"


class Tracker(Protocol):
    """Called by rank 0 alone. What it raises ends the tracker, not the run."""

    def begin(self, run_dir: Path, about: Mapping[str, Any]) -> None:
        """Before the first step. run_dir: the run's folder, the same when it is resumed; about: the whole config."""
        ...

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """After a step (from 1): single numbers by path, as loss and bytes/node."""
        ...

    def close(self) -> None:
        """After the last step, or when the run ends early."""
        ...


class TensorBoard:
    """Event files in the run folder's tensorboard/."""

    def begin(self, run_dir: Path, about: Mapping[str, Any]) -> None:
        from tensorboard.summary import Writer  # costs 0.2 s, which only rank 0 of a run should pay

        self._board = Writer(str(run_dir / "tensorboard"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A run of the project `twinmoe`, continued when the run is; wandb's own settings say where it goes."""

    def begin(self, run_dir: Path, about: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        where = run_dir.resolve()
        self._run = wandb.init(
            project="twinmoe",
            name=where.name,
            id=hashlib.sha256(str(where).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(where),
            config=dict(about),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, tuple[Callable[[], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WeightsAndBiases, "wandb"),
}
"""Name -> (what makes it, the module that it needs, which is the extra to install too)."""


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError for a name that nobody offers, or whose package is not installed. Imports nothing."""
    for name in names:
        if name in TRACKERS:
            module = TRACKERS[name][1]
            if importlib.util.find_spec(module) is None:
                raise ConfigError(f"train.trackers names {name}; install it with: pip install {module}")
        elif _offered(name) is None:
            known = sorted({*TRACKERS, *(e.name for e in entry_points(group=GROUP))})
            raise ConfigError(f"train.trackers: {name} is unknown; choose among {', '.join(known)}")


def open_trackers(names: Sequence[str], run_dir: Path, about: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run, begun. ConfigError as `check_trackers`."""
    check_trackers(names)
    opened: list[Tracker] = []
    for name in names:
        offered = _offered(name)
        tracker = TRACKERS[name][0]() if name in TRACKERS or offered is None else offered.load()()
        tracker.begin(run_dir, about)
        opened.append(tracker)
    return opened


def _offered(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=GROUP, name=name)), None)
