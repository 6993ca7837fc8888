"""Our layer in somebody else's model and loop gives what the same model gives on one process."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from twinmoe.testing.processes import run_processes

pytestmark = pytest.mark.processes
LOOP = "twinmoe.testing.end_to_end.targets:their_loop"


@lru_cache
def alone() -> dict[str, Any]:
    return run_processes(1, LOOP, {"wrap": "none", "expert": 1})


@pytest.mark.parametrize(("wrap", "ranks", "expert"), [("ddp", 4, 4), ("ddp", 4, 2), ("fsdp", 2, 2)])
def test_three_steps_equal_one_process(wrap: str, ranks: int, expert: int) -> None:
    result = run_processes(ranks, LOOP, {"wrap": wrap, "expert": expert})
    np.testing.assert_allclose(result["losses"], alone()["losses"], rtol=1e-10)
    np.testing.assert_allclose(result["norms"], alone()["norms"], rtol=1e-10)


def test_a_raw_ddp_wrap_is_refused_before_it_averages_experts() -> None:
    result = run_processes(2, LOOP, {"wrap": "raw_ddp", "expert": 2})
    assert "would average the expert parameter" in result["error"]
    assert "exclude_experts" in result["error"]


def test_state_dict_names_experts_by_their_id() -> None:
    assert {"moe.experts.0.w_up", "moe.experts.7.w_down", "moe.w_router"} <= set(alone()["names"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_frozen_experts_get_no_gradient_and_do_not_decay(ranks: int) -> None:
    target = "twinmoe.testing.end_to_end.targets:frozen_experts"
    result = run_processes(ranks, target, {"expert": ranks})
    learning = {"moe__w_router": True, "moe__w_up": False, "moe__w_down": True}
    assert result["graded"] == learning
    assert result["moved"] == learning
    assert np.isfinite(result["norm"])
