"""Fuzz: any routing under any way of running the layer equals the oracle: ties, collapse, idle ranks, wild logits."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.backends import reference
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.moe_core.exactness import Case, Errors, Problem, expected_run, make_problem, run_steps, whole_values
from twinmoe.moe_core.verify import Runtimes, all_cases

TOLERANCE = 1e-10


@lru_cache
def cases(world: int) -> list[Case]:
    """With plain steps: AdamW makes steps of full size of gradients that are rounding, as wild logits leave them."""
    return [replace(labelled.case, optimizer="sgd") for labelled in all_cases(world, "float64")]


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, Case, dict[str, Any]]:
    """(world, case, what the logits are): few distinct values make ties, a large scale makes collapse."""
    world = draw(st.sampled_from((1, 2, 4)))
    how = {
        "seed": draw(st.integers(0, 10**6)),
        "levels": draw(st.sampled_from((1, 2, 3, 1000))),
        "scale": draw(st.sampled_from((0.0, 1e-3, 1.0, 4.0))),
        "favourite": draw(st.integers(0, 7)),
        "favour": draw(st.sampled_from((0.0, 1.0, 8.0))),
        "padding": draw(st.sampled_from((0.0, 0.3, 0.9, 1.0))),
    }
    return world, draw(st.sampled_from(cases(world))), how


def problem_of(case: Case, ranks: int, values: Any, how: dict[str, Any]) -> Problem:
    """The problem of a case with drawn logits in the channels that the router reads, and a drawn mask."""
    rng = np.random.default_rng(how["seed"])
    plain = make_problem(case, ranks, values, how["seed"])
    x, num = plain.x_SLD.copy(), min(case.moe.num_experts, plain.x_SLD.shape[2])
    steps = rng.integers(0, how["levels"], (*x.shape[:2], num)) / how["levels"]
    x[..., :num] = how["scale"] * steps
    x[..., how["favourite"] % num] += how["favour"]
    real = plain.real_SL & (rng.random(plain.real_SL.shape) >= how["padding"])
    return replace(plain, x_SLD=x, dy_SLD=plain.dy_SLD * real[..., None], real_SL=real)


def worst(world: int, case: Case, how: dict[str, Any]) -> tuple[float, str, bool]:
    def rank(comm: Any) -> tuple[float, str, bool]:
        runtime = Runtimes(reference, comm).of(case)
        problem = problem_of(case, runtime.mesh.token_ranks, whole_values(case, runtime), how)
        errors = Errors()
        for got, want in zip(run_steps(case, problem, reference, runtime), expected_run(case, problem), strict=True):
            errors.compare_step(got, want, runtime)
        return (*errors.worst, errors.zeros_ok)

    return max(run_ranks(world, rank, 60), key=lambda found: (not found[2], found[0]))


def fuzz(examples: int) -> None:
    @settings(max_examples=examples)
    @given(routings())
    def any_routing(drawn: tuple[int, Case, dict[str, Any]]) -> None:
        error, where, zeros_ok = worst(*drawn)
        assert zeros_ok, where
        assert error <= TOLERANCE, f"{drawn[1].name}: {where} differs by {error:.3g}"

    any_routing()
    print(f"routings tried: {examples}")


def test_any_routing_is_computed_exactly() -> None:
    fuzz(20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_routings_are_computed_exactly() -> None:
    fuzz(3000)
