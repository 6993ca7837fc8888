"""One bad token: field case D13, input A, and what each policy does about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.routing import Memo, make_router
from twinmoe.moe_core.routing.finite import NonFiniteError, describe_non_finite, raise_non_finite, screen
from twinmoe.moe_core.routing.gate import gate
from twinmoe.testing.moe_core.routing.support import context, gradients, route, settings, tokens

nan = float("nan")
LOGITS = np.array([[1, 0, 2, -1], [nan] * 4, [nan, 1, 0, 2], [0, 0, 0, 0]])
SKIP = settings(num_experts=4, top_k=2, softmax_order="after_topk", nan_policy="skip")
CLEAN = [0.7310585786, 0.2689414214]


def test_nan_logits_count_as_minus_infinity_and_touch_no_other_token(home: Backend) -> None:
    ops = home.ops
    choice = gate(context(ops, SKIP, 4), ops.asarray(LOGITS), tokens(ops, 4), Memo())
    alone = gate(context(ops, SKIP, 4), ops.asarray(LOGITS[[0, 3]]), tokens(ops, 2), Memo())
    ids, weights = ops.to_numpy(choice.chosen_TK), ops.to_numpy(choice.weights_TK)
    assert ids[[0, 2, 3]].tolist() == [[2, 0], [3, 1], [0, 1]]
    assert len(set(ids[1])) == 2
    np.testing.assert_allclose(weights[[0, 2, 3]], [CLEAN, CLEAN, [0.5, 0.5]], rtol=1e-9)
    np.testing.assert_array_equal(weights[[0, 3]], ops.to_numpy(alone.weights_TK))
    assert ops.to_numpy(choice.nan_T).tolist() == [False, True, True, False]
    assert ops.to_numpy(choice.unusable_T).tolist() == [False, True, False, False]


def test_a_skipped_token_has_no_expert_no_weight_and_is_counted(home: Backend) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3))
    w = np.random.default_rng(1).standard_normal((3, 4))
    moe = SKIP.model_copy(update={"aux_loss_coeff": 1.0, "z_loss_coeff": 1.0})
    bad = x.copy()
    bad[1, 2] = nan
    found, fine = route(home, moe, bad, w), route(home, moe, x, w, real_T=[True, False, True, True])
    assert found.statistics["nan_tokens"].tolist() == [1]
    assert found.nan.tolist() == [False, True, False, False]
    np.testing.assert_array_equal(found.chosen, fine.chosen)
    assert (found.ids[1] == -1).all()
    assert not found.weights[1].any()
    np.testing.assert_array_equal(found.weights[[0, 2, 3]], fine.weights[[0, 2, 3]])
    assert found.losses == fine.losses
    infinite = x.copy()
    infinite[1, 0] = np.inf
    np.testing.assert_array_equal(route(home, moe, infinite, w).ids, found.ids)


@pytest.mark.parametrize("router", ["topk", "grap", "hash", "expert_token_resonance", "expert_choice"])
def test_gradients_stay_finite_beside_a_skipped_token(home: Backend, router: str) -> None:
    """0 x NaN must not reach the gate, whatever the router."""
    moe = settings(
        router=router, num_experts=4, top_k=2, nan_policy="skip", aux_loss_coeff=1.0, z_loss_coeff=1.0,
        capacity_factor=1.0,
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((4, 8))
    x[1, 2] = nan

    def fn(ops: Any, x_TD: Any, w_DE: Any) -> Any:
        made = make_router(context(ops, moe, 8))
        params = {p.name: w_DE for p in made.parameters("")}
        routing = made.route(params, x_TD, tokens(ops, 4, token_ids_T=np.arange(4)), Memo())
        total = routing.weights_TK.sum(-1).sum(-1) + 0.0 * (w_DE.sum(-1).sum(-1))
        for value in routing.losses.values():
            total = total + value
        return total + 0.0 * ops.where(x_TD == x_TD, x_TD, 0.0).sum(-1).sum(-1)

    value, (dx, dw) = gradients(home, fn, x, np.random.default_rng(1).standard_normal((8, 4)))
    assert np.isfinite(value)
    assert np.isfinite(dx[[0, 2, 3]]).all()
    assert np.isfinite(dw).all()


def test_the_default_policy_finds_and_names_the_token(home: Backend) -> None:
    x = np.random.default_rng(0).standard_normal((6, 4))
    x[4, 0] = nan
    moe = settings(num_experts=4, top_k=2)
    routed = route(home, moe, x, sequences=2)
    assert routed.statistics["nan_tokens"].tolist() == [1]
    assert ((routed.ids >= 0) & (routed.ids < 4)).all()
    name = describe_non_finite(home.ops, routed.device.nan_T, rank=3, layer=7, length=3)
    assert name == "rank 3, layer 7, sequence 1 position 1"
    with pytest.raises(NonFiniteError, match="rank 3, layer 7, sequence 1 position 1; lower the learning rate"):
        raise_non_finite([None, name])
    with pytest.raises(NonFiniteError, match="another rank"):
        raise_non_finite([None])
    fine = route(home, moe, x[:4])
    assert fine.statistics["nan_tokens"].tolist() == [0]
    assert describe_non_finite(home.ops, fine.device.nan_T, 0, 0, 4) is None


def test_padding_may_hold_anything(home: Backend) -> None:
    x = np.random.default_rng(0).standard_normal((4, 4))
    x[3] = nan
    routed = route(home, settings(num_experts=4, top_k=2), x, real_T=[True, True, True, False])
    assert routed.statistics["nan_tokens"].tolist() == [0]
    hashed = route(home, settings(router="hash", num_experts=4, top_k=2), x, token_ids_T=np.arange(4))
    assert hashed.nan.tolist() == [False, False, False, True]


def test_looking_changes_nothing(home: Backend) -> None:
    logits = home.ops.asarray(LOGITS)
    assert screen(home.ops, "raise", logits).logits_TE is logits
