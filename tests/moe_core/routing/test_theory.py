"""Cap probabilities, capacity bounds and success rates: P4, P5 and theorem 5 of the sheet."""

from __future__ import annotations

import math

import numpy as np
import pytest
from twinmoe.moe_core.routing import theory


@pytest.mark.parametrize(
    ("width", "delta", "p"),
    [(64, 0.1, 0.428027), (64, 0.2, 0.110188), (64, 0.3, 0.015184), (3, 0.5, 0.5), (4, 0.5, 0.391002)],
)
def test_cap_probability(width: int, delta: float, p: float) -> None:
    assert theory.cap_probability(delta, width) == pytest.approx(p, abs=1e-6)
    assert theory.cap_probability(delta, width, two_sided=False) == pytest.approx(p / 2, abs=1e-6)


def test_in_three_dimensions_the_cap_is_linear() -> None:
    for delta in np.linspace(0, 1, 11):
        assert theory.cap_probability(float(delta), 3) == pytest.approx(1 - delta, abs=1e-12)


def test_monte_carlo_agrees() -> None:
    x = np.random.default_rng(0).standard_normal((400_000, 64))
    cosine = np.abs(x[:, 0]) / np.linalg.norm(x, axis=1)
    for delta in (0.1, 0.2, 0.3):
        assert (cosine >= delta).mean() == pytest.approx(theory.cap_probability(delta, 64), abs=2e-3)


def test_one_sided_caps_of_opposite_thresholds_fill_the_sphere() -> None:
    up, down = (theory.cap_probability(d, 64, two_sided=False) for d in (0.2, -0.2))
    assert up + down == pytest.approx(1.0, abs=1e-12)
    assert theory.cap_probability(0.0, 64, two_sided=False) == pytest.approx(0.5)
    assert theory.cap_probability(-0.2, 64) == 1.0


BOUNDS = [
    (64, 4, 0.2, 2.268854, 2.357566, 0.922958),
    (64, 4, 0.3, 16.464557, 17.789196, 5.100877),
    (512, 8, 0.1, 5.317745, 5.363971, 1.637913),
    (5120, 16, 0.03, 1.964810, 1.966358, 0.626534),
]


@pytest.mark.parametrize(("width", "experts", "delta", "exact", "erfc", "exp"), BOUNDS)
def test_capacity_bounds(width: int, experts: int, delta: float, exact: float, erfc: float, exp: float) -> None:
    assert theory.capacity_bound(delta, width, experts) == pytest.approx(exact, rel=1e-6)
    assert theory.capacity_bound_erfc(delta, width, experts) == pytest.approx(erfc, rel=1e-6)
    assert theory.capacity_bound_exp(delta, width, experts) == pytest.approx(exp, rel=1e-5)


def test_one_sided_caps_double_the_bound() -> None:
    assert theory.capacity_bound(0.2, 64, 4, two_sided=False) == pytest.approx(4.538, abs=5e-4)


def test_bounds_grow_with_delta_and_width_and_fall_as_1_over_n() -> None:
    for bound in (theory.capacity_bound, theory.capacity_bound_exp):
        grid = [[bound(delta, width, 8) for delta in (0.05, 0.1, 0.2, 0.3)] for width in (64, 128, 512)]
        assert (np.diff(grid, axis=0) > 0).all()
        assert (np.diff(grid, axis=1) > 0).all()
        assert bound(0.1, 512, 16) == pytest.approx(bound(0.1, 512, 8) / 2)
    for width in (64, 512, 5120):
        for delta in (0.01, 0.03, 0.1):
            assert theory.capacity_bound(delta, width, 8) > theory.capacity_bound_exp(delta, width, 8)


def test_extreme_thresholds_neither_underflow_nor_overflow() -> None:
    assert 0 < theory.cap_probability(0.2, 5120) < 1e-16
    assert math.isfinite(theory.capacity_bound(0.2, 5120, 16))
    assert theory.capacity_bound_exp(0.9, 5120, 16) == math.inf
    assert theory.capacity_bound(0.9999, 100_000, 16) == math.inf


@pytest.mark.parametrize(("capacity", "delta"), [(1, 0.0329), (8, 0.0435), (64, 0.0520), (512, 0.0593)])
def test_the_threshold_of_a_capacity_inverts_the_exp_form(capacity: int, delta: float) -> None:
    found = theory.delta_of_capacity(capacity, 5120, 16)
    assert found == pytest.approx(delta, abs=5e-5)
    assert theory.capacity_bound_exp(found, 5120, 16) == pytest.approx(capacity)


def test_the_histogram_quantile_is_close_below_the_exact_one() -> None:
    cosines, edges = np.abs(np.random.default_rng(0).normal(0.03, 0.014, 5000)), theory.cosine_edges(5120)
    counts = (cosines[:, None] >= edges).sum(0)
    for q in (0.05, 0.1, 0.5):
        exact, found = np.quantile(cosines, q, method="higher"), theory.low_quantile(counts, edges, q)
        assert 0.97 * exact < found <= exact * (1 + 1e-12)
    assert theory.low_quantile(np.zeros(len(edges)), edges, 0.1) == 0.0


def test_success_when_tokens_choose() -> None:
    assert theory.token_choice_success(1024, 8, 0.5, 64) == pytest.approx(0.25, abs=1e-4)
    assert theory.token_choice_success(1024, 8, 0.5, 128) == pytest.approx(0.4835, abs=1e-4)


def test_success_when_experts_choose_stays_within_its_bounds() -> None:
    assert theory.expert_choice_success(4096, 0.001, 16) == pytest.approx(0.99999, abs=1e-5)
    assert theory.expert_choice_bound(4096, 0.001, 16)[0] == pytest.approx(0.9502, abs=1e-4)
    assert theory.expert_choice_success(4096, 0.2, 64) == pytest.approx(2e-295, rel=0.3)
    assert theory.expert_choice_bound(4096, 0.2, 64)[1] == pytest.approx(3.5e-45, rel=0.02)
