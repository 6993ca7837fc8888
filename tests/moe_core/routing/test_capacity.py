"""Capacity: P9 of the sheet, field cases D2 and D3, the resonance example, the angle rules."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.backends.registry import Backend, load
from twinmoe.moe_core.routing.capacity import expert_capacity, within_capacity, within_mass
from twinmoe.moe_core.routing.metrics import router_metrics
from twinmoe.moe_core.routing.state import initial, updated
from twinmoe.moe_core.routing.theory import capacity_bound
from twinmoe.testing.moe_core.routing.support import close, gate_logits, layer_output, loss_gradients, route, settings


@pytest.mark.parametrize(
    ("tokens", "k", "experts", "factor", "capacity"),
    [
        (7, 2, 4, 1.0, 4),
        (6, 2, 4, "1.25", 4),
        (16, 1, 8, 1, 2),
        (3, 1, 8, 1.25, 1),
        (100, 2, 4, 1.1, 55),
        (90, 2, 4, 1.4, 63),
        (7, 2, 4, Fraction(5, 4), 5),
        (3, 2, 4, "5/4", 2),
        (0, 2, 4, 1.1, 1),
    ],
)
def test_capacity_is_exact(tokens: int, k: int, experts: int, factor: Any, capacity: int) -> None:
    assert expert_capacity(factor, tokens, k, experts) == capacity


def test_locmoes_usual_rule() -> None:
    assert math.ceil(Fraction(32768) * Fraction("1.1") / (16 * 16)) == 141
    assert expert_capacity("1.1", 32768 // 16, 1, 16) == 141


# --- P9 ------------------------------------------------------------------------------------------
IDS = np.array([0, 0, 1, 0, 2, 0, 1, 0])[:, None]
GATES = np.array([0.3, 0.9, 0.5, 0.7, 0.4, 0.2, 0.6, 0.8])[:, None]


def kept(home: Backend, ids: np.ndarray, scores: np.ndarray | None, groups: int, experts: int, capacity: int) -> Any:
    ops = home.ops
    given = None if scores is None else ops.asarray(scores)
    return ops.to_numpy(within_capacity(ops, ops.asarray(ids), given, groups, experts, capacity))


def test_arrival_and_score_order(home: Backend) -> None:
    assert np.flatnonzero(kept(home, IDS, None, 1, 4, 2)).tolist() == [0, 1, 2, 4, 6]
    assert np.flatnonzero(kept(home, IDS, GATES, 1, 4, 2)).tolist() == [1, 2, 4, 6, 7]
    assert kept(home, IDS, GATES, 1, 4, 5).all()


def test_equal_scores_keep_the_earlier_token(home: Backend) -> None:
    assert np.flatnonzero(kept(home, IDS, np.ones((8, 1)), 1, 4, 2)).tolist() == [0, 1, 2, 4, 6]


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize(("groups", "k", "capacity"), [(1, 1, 3), (3, 2, 1), (4, 3, 2), (12, 2, 1), (2, 2, 0)])
def test_it_equals_a_plain_loop(home: Backend, by_score: bool, groups: int, k: int, capacity: int) -> None:
    rng = np.random.default_rng(groups)
    ids = np.argsort(rng.random((12, 5)), axis=1)[:, :k]
    ids[rng.random(ids.shape) < 0.2] = -1
    scores = rng.integers(0, 4, ids.shape).astype(float)
    expected = np.zeros(ids.shape, bool)
    for group in np.split(np.arange(12), groups):
        for expert in range(5):
            copies = [(t, j) for t in group for j in range(k) if ids[t, j] == expert]
            if by_score:
                copies.sort(key=lambda c: (-scores[c], c))
            for copy in copies[:capacity]:
                expected[copy] = True
    np.testing.assert_array_equal(kept(home, ids, scores if by_score else None, groups, 5, capacity), expected)


# --- D2 ------------------------------------------------------------------------------------------
D2 = np.zeros((5, 4))
D2[:, 0] = [1, 3, 0.5, 2, 1.5]
Y = np.array([4.7536688642, 17.4009701312, 10.6398373318, 28.4493837691, 29.9510513482])


@pytest.mark.parametrize(
    ("minimum", "policy", "survivors"),
    [(1, "position", {0, 1}), (1, "score", {1, 3}), (4, "position", {0, 1, 2, 3}), (4, "score", {0, 1, 3, 4})],
)
def test_everything_to_one_expert(home: Backend, minimum: int, policy: str, survivors: set[int]) -> None:
    moe = settings(num_experts=4, top_k=1, capacity_factor=1.0, drop_policy=policy, min_capacity=minimum)
    routed = gate_logits(home, moe, D2)
    assert routed.kept == survivors
    x = np.arange(1.0, 6)[:, None]
    y = layer_output(home, routed, x, [10, 20, 30, 40])[:, 0]
    close(y, np.where(np.isin(np.arange(5), list(survivors)), Y, 0))
    assert not y[[t for t in range(5) if t not in survivors]].any()
    totals = {"chosen_E": np.array([5, 0, 0, 0]), "kept_E": np.array([len(survivors), 0, 0, 0])}
    found = router_metrics(moe, totals)
    close([found["load_max_over_mean"], found["drop_rate"]], [4.0, 1 - len(survivors) / 5])


def test_the_balance_loss_counts_choices_before_dropping(home: Backend) -> None:
    moe = settings(num_experts=4, top_k=1, capacity_factor=1.0, aux_loss_coeff=0.01, aux_loss_scope="global")
    close(gate_logits(home, moe, D2).losses["load_balance"], 2.4082658068)
    close(loss_gradients(home, moe, "load_balance", D2, np.eye(4))[0], 2.4082658068)


# --- D3 ------------------------------------------------------------------------------------------
def test_ranks_of_different_length_agree_on_one_capacity() -> None:
    """Own capacities would be 5 and 2; the shared one is 5 and nothing is dropped (also with an empty rank)."""
    home = load("reference")
    moe = settings(num_experts=4, top_k=2, capacity_factor="1.25", capacity_group="rank", drop_policy="position")
    a = [1.0, 10, 100, 1000]

    def body(comm: Any, lengths: tuple[int, ...]) -> np.ndarray:
        number = lengths[comm.rank]
        group = comm.group("world", [list(range(comm.size))])
        even = (np.arange(number) % 2 == 0)[:, None]
        high, low = math.log(0.75), math.log(0.25)
        logits = np.where(even, [[high, low, -50, -50]], [[-50, -50, high, low]])
        routed = gate_logits(home, moe, logits, comm=comm, group=group)
        x = np.arange(1.0, number + 1)[:, None] + (0 if comm.rank == 0 else 7)
        return layer_output(home, routed, x, a)[:, 0]

    first, second = run_ranks(2, lambda comm: body(comm, (7, 3)))
    close(first, [3.25, 650, 9.75, 1300, 16.25, 1950, 22.75])
    close(second, [26, 2925, 32.5])
    first, second = run_ranks(2, lambda comm: body(comm, (7, 0)))
    close(first, [3.25, 650, 9.75, 1300, 16.25, 1950, 22.75])
    assert second.shape == (0,)


# --- expert-token resonance ------------------------------------------------------------------------
AFFINITY = np.array(
    [[0.60, 0.10, 0.20], [0.55, 0.50, 0.05], [0.30, 0.25, 0.20],
     [0.05, 0.70, 0.10], [0.10, 0.40, 0.45], [0.52, 0.51, 0.10]]
)  # fmt: skip


def resonance(home: Backend, k: int, capacity: int) -> list[set[int]]:
    """Tokens take their k best, experts keep their best `capacity` of those: the kept tokens of each expert."""
    ids = np.argsort(-AFFINITY, axis=1, kind="stable")[:, :k]
    survivors = np.where(kept(home, ids, np.take_along_axis(AFFINITY, ids, 1), 1, 3, capacity), ids, -1)
    return [set(np.flatnonzero((survivors == e).any(1)).tolist()) for e in range(3)]


def test_experts_keep_their_best_among_those_who_chose_them(home: Backend) -> None:
    assert resonance(home, 1, 2) == [{0, 1}, {3}, {4}]
    assert resonance(home, 2, 2) == [{0, 1}, {3, 5}, {4, 0}]


def test_affinity_mass_keeps_three_of_four(home: Backend) -> None:
    ops, ids = home.ops, AFFINITY.argmax(1)[:, None]
    scores = np.take_along_axis(AFFINITY, ids, 1)
    flags = ops.to_numpy(within_mass(ops, ops.asarray(ids), ops.asarray(scores), 1, 3, 0.8))[:, 0]
    assert set(np.flatnonzero(flags & (ids[:, 0] == 0))) == {0, 1, 5}
    assert flags[[3, 4]].all()
    whole = ops.to_numpy(within_mass(ops, ops.asarray(ids), ops.asarray(scores), 1, 3, 1.0))
    assert whole.all()


@pytest.mark.parametrize("scale", ["none", "sqrt"])
def test_the_resonance_router_rates_by_cosine_whatever_the_length(home: Backend, scale: str) -> None:
    x = np.random.default_rng(0).standard_normal((24, 8)) * np.random.default_rng(1).uniform(0.1, 30, (24, 1))
    moe = settings(
        router="expert_token_resonance", num_experts=4, top_k=1, capacity_factor=1.0, score_scale=scale,
        drop_policy="position",
    )  # fmt: skip
    routed = route(home, moe, x, sequences=2)
    unit = route(home, moe, x / np.linalg.norm(x, axis=1, keepdims=True), sequences=2)
    np.testing.assert_array_equal(routed.ids, unit.ids)
    close(routed.weights, unit.weights)
    cosine = x.reshape(24, 4, 2).mean(-1) * math.sqrt(8 / 4) / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_array_equal(routed.chosen[:, 0], cosine.argmax(1))
    for half in np.split(np.arange(24), 2):
        for e in range(4):
            chose = [t for t in half if routed.chosen[t, 0] == e]
            best = sorted(chose, key=lambda t: -cosine[t, e])[:3]
            assert {t for t in half if routed.ids[t, 0] == e} == set(best)
    relaxed = route(home, moe.model_copy(update={"affinity_mass": 0.5}), x, sequences=2)
    assert relaxed.kept < routed.kept


# --- capacity from the angle -------------------------------------------------------------------------
@pytest.mark.parametrize("router", ["grap", "topk", "expert_token_resonance"])
def test_angle_rules_measure_delta_and_use_the_exact_bound(home: Backend, router: str) -> None:
    moe = settings(
        router=router, num_experts=4, top_k=1, capacity_rule="angle_frozen", capacity_factor=1.5, capacity_quantile=0.1
    )
    x = np.random.default_rng(3).standard_normal((400, 64))
    w = np.random.default_rng(4).standard_normal((64, 4))
    vectors = w if router == "topk" else np.kron(np.eye(4), np.ones((1, 16))).T
    cosines = x @ vectors / (np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(vectors, axis=0))
    before = route(home, moe, x, w)
    assert np.bincount(before.ids[before.ids >= 0]).max() <= 150
    own = cosines[np.arange(400), before.chosen[:, 0]]
    totals = {**before.statistics, "chosen_E": np.bincount(before.chosen[:, 0], minlength=4)}
    state = updated(moe, 64, initial(moe), totals)
    exact = np.quantile(own, 0.1, method="higher")
    assert 0.96 * exact < state["delta"][0] <= exact
    after = route(home, moe, x, w, state=state)
    bound = max(1, math.ceil(capacity_bound(float(state["delta"][0]), 64, 4)))
    np.testing.assert_array_equal(
        np.bincount(after.ids[after.ids >= 0], minlength=4), np.minimum(np.bincount(after.chosen[:, 0]), bound)
    )


def test_a_frozen_angle_stays_and_a_stepwise_one_follows() -> None:
    frozen = settings(capacity_rule="angle_frozen")
    stepwise = settings(capacity_rule="angle_step")
    first = {"cosine_counts": np.r_[100, np.full(200, 100), np.zeros(56)], "chosen_E": np.ones(8)}
    later = {"cosine_counts": np.r_[100, np.full(220, 100), np.zeros(36)], "chosen_E": np.ones(8)}
    for moe, same in ((frozen, True), (stepwise, False)):
        one = updated(moe, 64, initial(moe), first)
        two = updated(moe, 64, one, later)
        assert (one["delta"] == two["delta"]) == same


def test_the_angle_capacity_stays_between_floor_and_ceiling(home: Backend) -> None:
    x = np.random.default_rng(3).standard_normal((40, 64))
    moe = settings(
        router="grap", num_experts=4, top_k=1, capacity_rule="angle_step", capacity_factor=1.0, min_capacity=3
    )
    for delta, capacity in ((0.0, 3), (0.99, 10)):
        routed = route(home, moe, x, state={"delta": np.array([delta])})
        loads = np.bincount(routed.chosen[:, 0], minlength=4)
        np.testing.assert_array_equal(
            np.bincount(routed.ids[routed.ids >= 0], minlength=4), np.minimum(loads, capacity)
        )
