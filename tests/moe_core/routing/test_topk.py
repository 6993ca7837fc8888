"""Learned gates: field cases D7 and D8, bias balancing, jitter, Switch."""

from __future__ import annotations

import numpy as np
import pytest
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.routing.state import bias_step, initial, updated
from twinmoe.testing.moe_core.routing.support import (
    close,
    finite_differences,
    gate_logits,
    gradients,
    host_softmax,
    layer_output,
    route,
    settings,
)

# --- D7: order of softmax and top-k, renormalisation, scaling ------------------------------------
D7 = np.array([[2.0, 1, 0, -1]])
PLAIN = {"softmax_order": "before_topk", "norm_topk_prob": False}
NORMALISED = {"softmax_order": "before_topk", "norm_topk_prob": True}
AFTER = {"softmax_order": "after_topk", "norm_topk_prob": False}
SIGMOID = {"score_function": "sigmoid"}
ROWS = [
    (PLAIN, [0.6439142599, 0.2368828181], 1.1176798961),
    (NORMALISED, [0.7310585786, 0.2689414214], 1.2689414214),
    (AFTER, [0.7310585786, 0.2689414214], 1.2689414214),
    ({**SIGMOID, **PLAIN}, [0.8807970780, 0.7310585786], 2.3429142352),
    ({**SIGMOID, **NORMALISED}, [0.5464491032, 0.4535508968], 1.4535508968),
]


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(("mode", "weights", "y"), ROWS)
def test_weights_of_every_recipe(home: Backend, mode: dict, weights: list[float], y: float, scale: float) -> None:
    moe = settings(num_experts=4, top_k=2, route_scale=scale, **mode)
    routed = gate_logits(home, moe, D7)
    assert routed.chosen.tolist() == [[0, 1]]
    close(routed.weights, [np.array(weights) * scale])
    close(layer_output(home, routed, [[1.0]], [1, 2, 3, 4]), [[y * scale]])


@pytest.mark.parametrize("mode", [PLAIN, NORMALISED, AFTER])
def test_choosing_every_expert_makes_the_recipes_agree(home: Backend, mode: dict) -> None:
    routed = gate_logits(home, settings(num_experts=4, top_k=4, **mode), D7)
    assert routed.chosen.tolist() == [[0, 1, 2, 3]]
    close(routed.weights, [[0.6439142599, 0.2368828181, 0.0871443187, 0.0320586033]])
    close(layer_output(home, routed, [[1.0]], [1, 2, 3, 4]), [[1.5073472654]])


def test_switch_is_top_1_with_its_own_probability(home: Backend) -> None:
    routed = gate_logits(home, settings(router="switch", num_experts=4, top_k=3), D7)
    assert routed.chosen.tolist() == [[0]]
    close(routed.weights, [[0.6439142599]])


@pytest.mark.parametrize("mode", [mode for mode, _, _ in ROWS])
def test_weights_have_the_gradient_of_finite_differences(home: Backend, mode: dict) -> None:
    from twinmoe.moe_core.routing import Memo, make_router
    from twinmoe.testing.moe_core.routing.support import context, tokens

    moe, seed = settings(num_experts=4, top_k=2, **mode), np.array([[0.3, -1.1], [0.7, 0.2]])
    x, w = np.random.default_rng(0).standard_normal((2, 3)), np.random.default_rng(1).standard_normal((3, 4))

    def fn(ops, x_TD, w_DE):
        router = make_router(context(ops, moe, 3))
        routing = router.route({"w_router": w_DE}, x_TD, tokens(ops, 2), Memo())
        return (routing.weights_TK * ops.asarray(seed)).sum(-1).sum(-1)

    _, (dx, dw) = gradients(home, fn, x, w)
    close(dx, finite_differences(lambda v: (route(home, moe, v, w).weights * seed).sum(), x), 1e-7)
    close(dw, finite_differences(lambda v: (route(home, moe, x, v).weights * seed).sum(), w), 1e-7)


# --- D8: groups and a negative bias ---------------------------------------------------------------
D8 = np.array([[0, 0.4, -0.4, 0.2, 0.6, -1]])
DEEPSEEK = settings(
    num_experts=6, top_k=2, score_function="sigmoid", num_groups=3, group_top_k=1, route_scale=2.5,
    bias_update_rate=0.001,
)  # fmt: skip


def test_groups_outside_are_minus_infinity_and_weights_are_clean(home: Backend) -> None:
    routed = gate_logits(home, DEEPSEEK, D8, state={"bias": np.full(6, -0.9)})
    assert routed.chosen.tolist() == [[1, 0]]
    close(routed.weights, [[1.3622790213, 1.1377209787]])
    close(layer_output(home, routed, [[1.0]], [1, 2, 3, 4, 5, 6]), [[3.8622790213]])


def test_rating_a_group_by_its_best_is_deepseek_v2(home: Backend) -> None:
    by_best = DEEPSEEK.model_copy(update={"group_score_top": 1})
    routed = gate_logits(home, by_best, D8, state={"bias": np.full(6, -0.9)})
    assert routed.chosen.tolist() == [[4, 5]]


def test_without_groups_the_bias_picks_freely(home: Backend) -> None:
    free = DEEPSEEK.model_copy(update={"num_groups": 1})
    assert gate_logits(home, free, D8, state={"bias": np.full(6, -0.9)}).chosen.tolist() == [[4, 1]]


def test_equal_groups_and_experts_go_to_the_lower_ids(home: Backend) -> None:
    moe = settings(
        num_experts=8, top_k=2, score_function="sigmoid", num_groups=4, group_top_k=2, bias_update_rate=0.001
    )
    routed = gate_logits(home, moe, np.zeros((3, 8)))
    assert routed.chosen.tolist() == [[0, 1]] * 3
    close(routed.weights, [[0.5, 0.5]] * 3)


def test_the_bias_only_selects(home: Backend) -> None:
    moe = settings(num_experts=4, top_k=2, bias_update_rate=0.1, aux_loss_coeff=1.0)
    logits = np.log([[0.4, 0.3, 0.2, 0.1]])
    routed = gate_logits(home, moe, logits, state={"bias": np.array([0, -0.25, 0, 0.0])})
    assert routed.chosen.tolist() == [[0, 2]]
    close(routed.weights, [[2 / 3, 1 / 3]])
    assert set(initial(moe)) == {"bias"}
    assert not initial(moe)["bias"].any()


# --- bias updates (hierarchical sheet, B5 and P10) -------------------------------------------------
def test_a_bias_step_by_sign_is_mean_centred() -> None:
    close(bias_step(np.array([8, 4, 2, 2]), 0.01, "sign"), [-0.0125, -0.0025, 0.0075, 0.0075])


def test_a_proportional_step() -> None:
    close(bias_step(np.array([8, 4, 2, 2]), 0.01, "proportional"), [-0.01, 0, 0.005, 0.005])


def test_no_rows_and_even_loads_move_nothing() -> None:
    for rule in ("sign", "proportional"):
        assert not bias_step(np.zeros(4), 0.01, rule).any()
        assert not bias_step(np.full(4, 7), 0.01, rule).any()


def test_updates_balance_a_skewed_router(home: Backend) -> None:
    """Nothing learns but the bias; the busiest expert comes down to near the mean."""
    moe = settings(num_experts=4, top_k=1, score_function="sigmoid", bias_update_rate=0.02)
    logits = np.random.default_rng(0).standard_normal((200, 4)) * 0.5 + [1.5, 0, 0, 0]
    state, loads = initial(moe), []
    for _ in range(30):
        routed = gate_logits(home, moe, logits, state=state)
        loads.append(np.bincount(routed.chosen[:, 0], minlength=4))
        state = updated(moe, 4, state, {"chosen_E": loads[-1]})
    assert loads[0].max() > 170
    assert loads[-1].max() < 70
    close(state["bias"].sum(), 0, 1e-12)


# --- jitter ------------------------------------------------------------------------------------------
def test_jitter_acts_in_training_only_and_is_keyed_by_step_layer_and_token(home: Backend) -> None:
    moe = settings(num_experts=4, top_k=4, router_jitter=0.3)
    logits = np.random.default_rng(0).standard_normal((6, 4))

    def weights(**fields: object) -> np.ndarray:
        return gate_logits(home, moe, logits, sequences=3, **fields).weights

    quiet = weights(training=False)
    close(np.sort(quiet), np.sort(host_softmax(logits)))
    loud = weights(step=5, layer=1)
    assert np.abs(loud - quiet).max() > 1e-3
    np.testing.assert_array_equal(loud, weights(step=5, layer=1))
    for other in ({"step": 6, "layer": 1}, {"step": 5, "layer": 2}, {"step": 5, "layer": 1, "seed": 3}):
        assert np.abs(loud - weights(**other)).max() > 1e-3
    alone = gate_logits(home, moe, logits[2:4], step=5, layer=1, sequence_positions=np.array([1])).weights
    np.testing.assert_allclose(alone, loud[2:4], rtol=1e-12)
