"""Losses do not depend on ranks, meshes, sharding, schemes, recomputation, accumulation or the framework."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from twinmoe.moe_core import packaged
from twinmoe.moe_core.compose import load_config
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.processes import run_processes

pytestmark = pytest.mark.processes

CONFIG: dict[str, Any] = {
    "model": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_dense_layers": 0},
    "moe": {"num_experts": 8, "expert_hidden_size": 32, "z_loss_coeff": 0.001, "num_shared_experts": 1},
    "train": {
        "steps": 5,
        "warmup_steps": 2,
        "dtype": "float64",
        "global_batch_size": 8,
        "sequence_length": 32,
        "validation_batches": 1,
    },
}
SKEWED = {
    "planner": "least_loaded",
    "residency": "borrowed",
    "least_loaded": {"min_rows": 1, "imbalance_threshold": "1"},
}
MOVING = {
    "planner": "relayout",
    "residency": "fully_sharded",
    "slots_per_rank": 3,
    "relayout": {"skip_below": 0, "hysteresis": 0, "window": 2},
}


def losses(ranks: int, changes: Sequence[dict[str, dict[str, Any]]], backend: str = "cpu") -> list[np.ndarray]:
    """Per-step losses and the validation loss of CONFIG with each of the changes."""
    configs = []
    for sections in changes:
        config = copy.deepcopy(CONFIG)
        for name, values in sections.items():
            config.setdefault(name, {}).update(values)
        configs.append(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"configs": configs, "folder": folder}
        result = run_processes(ranks, "twinmoe.testing.end_to_end.targets:train", arguments, backend)
    return [np.array([*s["losses"], s["validation_loss"]]) for s in result["summaries"]]


@lru_cache
def alone() -> np.ndarray:
    return losses(1, [{}])[0]


LAYOUTS = {
    "two ranks": (2, {}),
    "four ranks": (4, {}),
    "experts x data 2 x 2": (4, {"parallel": {"expert_parallel_size": 2}}),
    "data parallel only": (2, {"parallel": {"expert_parallel_size": 1}}),
    "dense parameters sharded": (4, {"parallel": {"expert_parallel_size": 2, "data_sharding": "full"}}),
    "micro-batches, layers recomputed": (2, {"train": {"micro_batch_size": 2, "recompute": "layer"}}),
    "experts recomputed": (2, {"train": {"recompute": "experts"}}),
    "least loaded": (4, {"parallel": SKEWED, "train": {"recompute": "layer"}}),
    "relayout": (4, {"parallel": MOVING, "train": {"micro_batch_size": 1}}),
    "hierarchical": (4, {"parallel": {"transport": "hierarchical_dedup"}}),
}


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_are_those_of_one_process(ranks: int) -> None:
    changes = {name: sections for name, (size, sections) in LAYOUTS.items() if size == ranks}
    found = losses(ranks, list(changes.values()))
    for name, values in zip(changes, found, strict=True):
        np.testing.assert_allclose(values, alone(), rtol=1e-9, err_msg=name)


def test_mindspore_trains_the_same_file_to_the_same_losses() -> None:
    load_or_skip("mindspore-cpu")
    np.testing.assert_allclose(losses(2, [{}], "mindspore-cpu")[0], alone(), rtol=1e-9)


SMALL = (
    *("model.hidden_size=32", "model.num_layers=2", "moe.expert_hidden_size=32", "train.dtype=float64"),
    *("train.steps=10", "train.warmup_steps=2", "train.global_batch_size=8", "train.sequence_length=32"),
    *("train.validate_every=0", "train.save_every=0", "train.validation_batches=1"),
)
NEEDS_MORE = {"finetune_llep"}
"""Experiments that start from a checkpoint of somebody else's."""


def packaged_runs() -> dict[str, dict[str, Any]]:
    """Every packaged scheme and experiment in a small size."""
    small = {"parallel.relayout.skip_below=0", "parallel.least_loaded.min_rows=1"}
    schemes = {name: load_config("quickstart", [f"parallel.scheme={name}", *small, *SMALL]) for name in SCHEMES}
    own = {"latent_hp": ("moe.head_dim=8",)}
    experiments = {name: load_config(name, [*SMALL, *own.get(name, ())]) for name in EXPERIMENTS}
    return {name: config.model_dump(mode="json") for name, config in (schemes | experiments).items()}


SCHEMES = packaged.names("schemes")
EXPERIMENTS = [name for name in packaged.names("experiments") if name not in NEEDS_MORE]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_scheme_and_experiment_file_trains_to_the_same_losses_on_mindspore() -> None:
    load_or_skip("mindspore-cpu")
    runs = packaged_runs()
    found = {}
    for backend in ("cpu", "mindspore-cpu"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"configs": list(runs.values()), "folder": folder}
            result = run_processes(4, "twinmoe.testing.end_to_end.targets:train", arguments, backend, seconds=500)
        found[backend] = [[*s["losses"], s["validation_loss"]] for s in result["summaries"]]
    for name, ours, theirs in zip(runs, found["cpu"], found["mindspore-cpu"], strict=True):
        assert len(ours) == 11
        np.testing.assert_allclose(theirs, ours, rtol=1e-9, err_msg=name)
