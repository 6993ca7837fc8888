"""The experts of a transformers model, spread over ranks inside the Trainer of transformers: the same training."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from twinmoe.testing.processes import run_processes

pytest.importorskip("accelerate", reason="accelerate is not installed (extra hf)")
pytestmark = pytest.mark.processes

LENT = {"planner": "least_loaded", "residency": "borrowed", "least_loaded": {"min_rows": 1, "imbalance_threshold": "1"}}
SHARDED = {"planner": "relayout", "residency": "fully_sharded", "slots_per_rank": 4}
SCHEMES: list[dict[str, Any]] = [{}, LENT, SHARDED, {"expert_parallel_size": 1}]
MODELS = ["qwen3_moe", "gpt_oss"]


def runs(ranks: int, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"runs": [{**run, "folder": f"{folder}/{i}"} for i, run in enumerate(wanted)]}
        return run_processes(ranks, "twinmoe.testing.end_to_end.their_trainer:train", arguments, "cpu")["runs"]


@lru_cache
def unmodified() -> dict[str, dict[str, Any]]:
    """By model, and of the accelerate script."""
    wanted: list[dict[str, Any]] = [{"model": model, "parallel": None} for model in MODELS]
    script = {"model": "gpt_oss", "parallel": None, "script": "accelerate"}
    return dict(zip([*MODELS, "script"], runs(1, [*wanted, script]), strict=True))


CASES = [(model, scheme) for model in MODELS for scheme in (SCHEMES if model == "qwen3_moe" else SCHEMES[:1])]


@lru_cache
def swapped() -> list[dict[str, Any]]:
    """Of each case, of the accelerate script, and last of a stock Trainer."""
    script = {"model": "gpt_oss", "parallel": LENT, "script": "accelerate"}
    stock = {"model": "qwen3_moe", "parallel": {}, "stock": True}
    cases = [{"model": model, "parallel": scheme, "recompute": scheme is LENT} for model, scheme in CASES]
    return runs(2, [*cases, script, stock])


@pytest.mark.parametrize("number", range(len(CASES)))
def test_twenty_clipped_steps_on_two_ranks_are_those_of_the_unmodified_model_on_one(number: int) -> None:
    (model, scheme), found = CASES[number], swapped()[number]
    alone = unmodified()[model]
    assert found["swapped"] == 3
    assert len(alone["loss"]) == 20
    assert min(alone["grad_norm"]) > 0.1
    # transformers takes norms and the loss in float32 even of a model in float64
    np.testing.assert_allclose(found["loss"], alone["loss"], rtol=1e-6, err_msg=str(scheme))
    np.testing.assert_allclose(found["grad_norm"], alone["grad_norm"], rtol=1e-6, err_msg=str(scheme))
    assert found["differs"] == [], "what the Trainer saved is the model"
    assert found["sums"].keys() == alone["sums"].keys()
    for name, value in alone["sums"].items():
        assert found["sums"][name] == pytest.approx(value, rel=1e-6), name


def test_an_accelerate_script_that_accumulates_and_clips_is_the_same_too() -> None:
    found, alone = swapped()[-2], unmodified()["script"]
    assert len(alone["grad_norm"]) == 5
    assert min(alone["grad_norm"]) > 0.1
    np.testing.assert_allclose(found["loss"], alone["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["grad_norm"], alone["grad_norm"], rtol=1e-6)


def test_a_stock_trainer_that_clips_is_refused_with_the_remedy() -> None:
    found = swapped()[-1]
    assert "would clip by the norm of one rank's experts" in found["error"]
    assert "class MyTrainer(ExpertClipping, Trainer)" in found["error"]
