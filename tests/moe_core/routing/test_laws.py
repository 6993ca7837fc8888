"""What holds for every router, on any input: laws drawn by hypothesis, on the reference and the host's torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from twinmoe.backends.registry import Backend, load
from twinmoe.moe_core.config import MoeConfig
from twinmoe.moe_core.routing import Memo, make_router, router_names
from twinmoe.moe_core.routing.capacity import expert_capacity
from twinmoe.testing.moe_core.routing.support import (
    context,
    gate_logits,
    gradients,
    host_softmax,
    route,
    settings,
    tokens,
)

FEW = hypothesis_settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip
WIDTH, EXPERTS, LENGTH = 12, 6, 5


@pytest.fixture(params=["reference", "cpu", pytest.param("mindspore-cpu", marks=pytest.mark.slow)], scope="module")
def quick(request: pytest.FixtureRequest) -> Backend:
    """The backends that are cheap to ask often."""
    return load(request.param)


def drawn(seed: int, sequences: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((sequences * LENGTH, WIDTH)), rng.standard_normal((WIDTH, EXPERTS))


def learned(k: int, **fields: Any) -> MoeConfig:
    return settings(num_experts=EXPERTS, top_k=k, **fields)


choices = st.fixed_dictionaries(
    {
        "score_function": st.sampled_from(["softmax", "sigmoid"]),
        "softmax_order": st.sampled_from(["before_topk", "after_topk"]),
        "norm_topk_prob": st.booleans(),
    }
)


@FEW
@given(seed=st.integers(0, 10**6), k=st.integers(1, EXPERTS), shift=st.floats(-50, 50), options=choices)
def test_softmax_gates_ignore_a_shift_of_all_logits(
    quick: Backend, seed: int, k: int, shift: float, options: dict
) -> None:
    logits = np.random.default_rng(seed).standard_normal((4, EXPERTS))
    moe = learned(k, **{**options, "score_function": "softmax"})
    plain, moved = gate_logits(quick, moe, logits), gate_logits(quick, moe, logits + shift)
    np.testing.assert_array_equal(plain.chosen, moved.chosen)
    np.testing.assert_allclose(plain.weights, moved.weights, atol=1e-11)


@FEW
@given(seed=st.integers(0, 10**6), k=st.integers(1, EXPERTS), scale=st.floats(1e-3, 1e3))
@pytest.mark.parametrize("router", ["topk", "grap", "expert_token_resonance"])
def test_choices_ignore_the_length_of_a_token(quick: Backend, router: str, seed: int, k: int, scale: float) -> None:
    x, w = drawn(seed)
    moe = learned(k, router=router)
    np.testing.assert_array_equal(route(quick, moe, x, w).chosen, route(quick, moe, scale * x, w).chosen)


@FEW
@given(seed=st.integers(0, 10**6), k=st.integers(1, EXPERTS), options=choices, scale=st.sampled_from([1.0, 2.5]))
def test_weights_sum_as_documented(quick: Backend, seed: int, k: int, options: dict, scale: float) -> None:
    """1 when normalised or softmaxed after top-k; the chosen probabilities otherwise; all times route_scale."""
    logits = np.random.default_rng(seed).standard_normal((4, EXPERTS))
    routed = gate_logits(quick, learned(k, route_scale=scale, **options), logits)
    soft = options["score_function"] == "softmax"
    scores = host_softmax(logits) if soft else 1 / (1 + np.exp(-logits))
    picked = np.take_along_axis(scores, routed.chosen, 1).sum(1)
    whole = (soft and options["softmax_order"] == "after_topk") or (options["norm_topk_prob"] and k > 1)
    np.testing.assert_allclose(routed.weights.sum(1), scale * (np.ones(4) if whole else picked), rtol=1e-12)
    assert (routed.weights >= 0).all()
    assert all(len(set(row)) == k for row in routed.chosen.tolist())


@FEW
@given(seed=st.integers(0, 10**6), k=st.integers(1, EXPERTS), options=choices)
def test_renaming_experts_renames_choices(quick: Backend, seed: int, k: int, options: dict) -> None:
    x, w = drawn(seed)
    order = np.random.default_rng(seed + 1).permutation(EXPERTS)
    moe = learned(k, aux_loss_coeff=1.0, z_loss_coeff=1.0, entropy_loss_coeff=1.0, **options)
    plain, renamed = (route(quick, moe, x, v, sequences=2) for v in (w, w[:, order]))
    np.testing.assert_array_equal(order[renamed.chosen], plain.chosen)
    np.testing.assert_allclose(renamed.weights, plain.weights, rtol=1e-10)
    for name, value in plain.losses.items():
        np.testing.assert_allclose(renamed.losses[name], value, rtol=1e-10)


@FEW
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("router", ["topk", "grap", "expert_token_resonance", "expert_choice"])
def test_reordering_tokens_reorders_choices(quick: Backend, router: str, seed: int) -> None:
    x, w = drawn(seed)
    order = np.random.default_rng(seed + 1).permutation(len(x))
    moe = learned(2, router=router, aux_loss_coeff=1.0)
    plain, moved = route(quick, moe, x, w), route(quick, moe, x[order], w)
    np.testing.assert_array_equal(moved.ids, plain.ids[order])
    np.testing.assert_allclose(moved.weights, plain.weights[order], rtol=1e-12)
    np.testing.assert_allclose(moved.losses["load_balance"], plain.losses["load_balance"], rtol=1e-12)


def everything(name: str) -> MoeConfig:
    return learned(
        2, router=name, num_groups=2, inner_router="topk", capacity_factor=1.0, aux_loss_coeff=1.0, z_loss_coeff=1.0,
        entropy_loss_coeff=1.0, locality_loss_coeff=1.0, locality_nodes=2, locality_scope="sequence", group_top_k=2,
    )  # fmt: skip


def where(order: np.ndarray) -> dict[str, Any]:
    """Two sequences of LENGTH tokens, in an order of the sequences."""
    ids = np.arange(2 * LENGTH).reshape(2, LENGTH) % 7
    return {
        "sequences": 2,
        "global_sequences": 2,
        "sequence_positions": order,
        "domains_S": order,
        "token_ids_T": ids[order].reshape(-1),
    }


@FEW
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("router", router_names())
def test_sequences_do_not_see_each_other(quick: Backend, router: str, seed: int) -> None:
    """Swapping the sequences of a batch swaps their routing, capacity included, and moves no loss."""
    x, w = drawn(seed)
    swap = np.array([1, 0])
    plain = route(quick, everything(router), x, w, **where(np.arange(2)))
    moved = route(quick, everything(router), x.reshape(2, LENGTH, WIDTH)[swap].reshape(x.shape), w, **where(swap))
    for a, b in ((plain.chosen, moved.chosen), (plain.ids, moved.ids), (plain.weights, moved.weights)):
        np.testing.assert_allclose(b.reshape(2, LENGTH, -1)[swap].reshape(a.shape), a, rtol=1e-12)
    for name, value in plain.losses.items():
        np.testing.assert_allclose(moved.losses[name], value, rtol=1e-10)


@FEW
@given(seed=st.integers(0, 10**6), factor=st.sampled_from(["0.25", "0.5", "1", "1.25", "3"]), by_score=st.booleans())
@pytest.mark.parametrize("router", ["topk", "switch", "grap", "hash", "hierarchical", "expert_token_resonance"])
def test_capacity_conserves_and_bounds(quick: Backend, router: str, seed: int, factor: str, by_score: bool) -> None:
    x, w = drawn(seed)
    k = 1 if router == "switch" else 2
    moe = learned(
        k, router=router, num_groups=2 if router == "hierarchical" else 1, capacity_factor=factor,
        drop_policy="score" if by_score else "position",
    )  # fmt: skip
    routed = route(quick, moe, x, w, **where(np.arange(2)))
    kept = routed.ids >= 0
    np.testing.assert_array_equal(routed.ids[kept], routed.chosen[kept])
    capacity = expert_capacity(factor, LENGTH, k, EXPERTS)
    for rows in np.split(np.arange(2 * LENGTH), 2):
        chosen = np.bincount(routed.chosen[rows].reshape(-1), minlength=EXPERTS)
        held = np.bincount(routed.ids[rows][kept[rows]], minlength=EXPERTS)
        np.testing.assert_array_equal(held, np.minimum(chosen, capacity))


@hypothesis_settings(parent=FEW, max_examples=5)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("router", router_names())
def test_gradients_equal_finite_differences(quick: Backend, router: str, seed: int) -> None:
    """Weights and every loss, in x and in the gate: decisions held, as recomputation holds them."""
    x, w = drawn(seed)
    moe, weigh = everything(router), np.random.default_rng(seed).standard_normal((2 * LENGTH, EXPERTS))
    memo: dict[int, Any] = {}

    def fn(ops: Any, x_TD: Any, w_DE: Any) -> Any:
        made = make_router(context(ops, moe, WIDTH))
        params = {p.name: w_DE for p in made.parameters("")}
        held = Memo(made.initial_state(), memo.get(id(ops), {}))
        routing = made.route(params, x_TD, tokens(ops, 2 * LENGTH, **where(np.arange(2))), held)
        memo.setdefault(id(ops), held.decided)
        columns = routing.weights_TK.shape[1]
        total = (routing.weights_TK * ops.asarray(weigh[:, :columns].copy())).sum(-1).sum(-1)
        for value in routing.losses.values():
            total = total + value
        return total + (x_TD * 0.0).sum(-1).sum(-1) + (w_DE * 0.0).sum(-1).sum(-1)

    _, (dx, dw) = gradients(quick, fn, x, w)
    value_of = lambda a, b: gradients(quick, fn, a, b)[0]  # noqa: E731
    rng = np.random.default_rng(seed + 2)
    for gradient, along in ((dx, 0), (dw, 1)):
        direction = rng.standard_normal(gradient.shape)
        ahead, behind = (
            value_of(x + t * direction, w) if along == 0 else value_of(x, w + t * direction) for t in (1e-5, -1e-5)
        )
        slope = (ahead - behind) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-7)
