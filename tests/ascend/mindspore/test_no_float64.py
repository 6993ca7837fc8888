"""NPUs have next to no float64: a training step in float32 hands none to the operations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.protocol import Launch
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.train import run
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.end_to_end.resume_runs import config, write_text

HOME = load_or_skip("mindspore-cpu")

import mindspore as ms  # noqa: E402

ROUTERS: dict[str, dict[str, Any]] = {
    "jitter and losses": {"router_jitter": 0.01, "z_loss_coeff": 0.001, "entropy_loss_coeff": 0.001},
    "locality": {"locality_nodes": 2, "locality_loss_coeff": 0.01},
    "capacity": {"capacity_factor": 1.0},
}


def is_wide(x: Any) -> bool:
    if isinstance(x, (list, tuple)):
        return any(is_wide(part) for part in x)
    return getattr(x, "dtype", None) in (np.float64, ms.float64)


class Recorder:
    """Operations that note who was given, or gave, a float64 tensor. asarray may be given none of the host either."""

    def __init__(self, ops: Any) -> None:
        self.called: set[str] = set()
        self.wide: set[str] = set()
        self.ops = SimpleNamespace(**{name: self._noted(name, getattr(ops, name)) for name in dir(ops)})

    def _noted(self, name: str, fn: Any) -> Any:
        if name.startswith("_") or not callable(fn) or isinstance(fn, type):
            return fn

        def call(*args: Any, **kwargs: Any) -> Any:
            found = fn(*args, **kwargs)
            self.called.add(name)
            if name != "to_numpy" and is_wide([*args, *kwargs.values(), found]):
                self.wide.add(name)
            return found

        return call


def test_the_recorder_sees_float64() -> None:
    recorder = Recorder(HOME.ops)
    recorder.ops.relu(recorder.ops.asarray(np.ones(2)))
    assert recorder.wide == {"asarray", "relu"}


@pytest.mark.parametrize("router", list(ROUTERS))
def test_a_training_step_hands_no_float64_to_the_operations(router: str, tmp_path: Path) -> None:
    said = config("ep", write_text(tmp_path / "text.txt"), steps=2, dtype="float32")
    said.setdefault("moe", {}).update(ROUTERS[router])
    recorder = Recorder(HOME.ops)
    (tmp_path / "run" / "logs").mkdir(parents=True)
    backend = dataclasses.replace(HOME, ops=recorder.ops)  # type: ignore[arg-type]
    summary = run(Config.model_validate(said), backend, Launch(), tmp_path / "run")
    assert summary["steps"] == 2
    assert {"asarray", "expert_mlp", "combine_rows"} <= recorder.called
    assert recorder.wide == set()
