"""The oracle against finite differences, and against right values of field reports."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from twinmoe.testing import oracle

T, D, E, F, K = 6, 3, 4, 2, 2


def parameters(moe: oracle.Moe, shared: bool, gated: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    up = 2 * F if moe.activation == "swiglu" else F
    params = {"w_router": (D, E), "w_up": (E, D, up), "w_down": (E, F, D)}
    if shared:
        params |= {"w_shared_up": (1, D, 2 * up), "w_shared_down": (1, 2 * F, D)}
    if gated:
        params["w_shared_gate"] = (D, 1)
    return {name: rng.normal(size=shape) for name, shape in params.items()}


def objective(moe: oracle.Moe, params: dict[str, np.ndarray], batch: oracle.Batch, dy: np.ndarray) -> float:
    out = oracle.run(moe, params, batch, dy)
    auxiliary = moe.aux_loss_coeff * out.losses["load_balance"] + moe.z_loss_coeff * out.losses["z"]
    return float((out.y * dy).sum()) + auxiliary


def differences(moe: oracle.Moe, params: dict[str, np.ndarray], batch: oracle.Batch, dy: np.ndarray):
    """Central differences of the objective in x and every parameter."""
    step, point = 1e-5, {"x": batch.x, **params}
    grads = {name: np.zeros(value.shape) for name, value in point.items()}
    for name, value in point.items():
        for i in np.ndindex(value.shape):
            sides = []
            for sign in (1, -1):
                moved = {n: v.copy() for n, v in point.items()}
                moved[name][i] += sign * step
                x = moved.pop("x")
                shifted = oracle.Batch(x, batch.sequences, batch.total, batch.layers, batch.real_T, batch.keep_TK)
                sides.append(objective(moe, moved, shifted, dy))
            grads[name][i] = (sides[0] - sides[1]) / (2 * step)
    return grads


SCORES = [
    {"score_function": score, "softmax_order": order, "norm_topk_prob": norm, "route_scale": scale}
    for score, order, norm, scale in [
        ("softmax", "before_topk", True, 1.0),
        ("softmax", "before_topk", False, 2.5),
        ("softmax", "after_topk", True, 2.5),
        ("sigmoid", "before_topk", True, 2.5),
        ("sigmoid", "before_topk", False, 1.0),
    ]
]


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(("activation", "shared"), [("swiglu", "none"), ("gelu", "gated"), ("swiglu", "plain")])
def test_gradients_equal_finite_differences(scores: dict, activation: str, shared: str) -> None:
    moe = oracle.Moe(E, K, activation=activation, aux_loss_coeff=0.3, z_loss_coeff=0.2, **scores)
    check_gradients(moe, shared)


@pytest.mark.parametrize("moe", [oracle.Moe(E, 1, router="switch", aux_loss_coeff=0.5), oracle.Moe(E, E)])
def test_gradients_equal_finite_differences_for_switch_and_for_all_experts(moe: oracle.Moe) -> None:
    check_gradients(moe, "none")


def check_gradients(moe: oracle.Moe, shared: str) -> None:
    rng = np.random.default_rng(0)
    params = parameters(moe, shared != "none", shared == "gated")
    keep = rng.random((T, moe.top_k)) < 0.8
    real = np.array([True, True, False, True, True, False])
    batch = oracle.Batch(rng.normal(size=(T, D)), 2, total=9.0, layers=3, real_T=real, keep_TK=keep)
    dy = rng.normal(size=(T, D))
    grads = oracle.run(moe, params, batch, dy).grads
    for name, expected in differences(moe, params, batch, dy).items():
        np.testing.assert_allclose(grads[name], expected, rtol=1e-7, atol=1e-8, err_msg=name)


def identity_router(logits: Sequence[Sequence[float]], moe: oracle.Moe, **batch: object) -> oracle.Result:
    """The oracle on given logits: x = logits, identity router, experts of zeros."""
    x = np.array(logits, float)
    e = x.shape[1]
    params = {"w_router": np.eye(e), "w_up": np.zeros((e, e, 2)), "w_down": np.zeros((e, 1, e))}
    defaults = {"sequences": 1, "total": float(len(x))}
    return oracle.run(moe, params, oracle.Batch(x, **{**defaults, **batch}), np.zeros(x.shape))  # type: ignore[arg-type]


WEIGHTS = [
    ({"norm_topk_prob": False}, [0.6439142599, 0.2368828181]),
    ({"norm_topk_prob": True}, [0.7310585786, 0.2689414214]),
    ({"softmax_order": "after_topk"}, [0.7310585786, 0.2689414214]),
    ({"score_function": "sigmoid", "norm_topk_prob": False}, [0.8807970780, 0.7310585786]),
    ({"score_function": "sigmoid", "norm_topk_prob": True}, [0.5464491032, 0.4535508968]),
]


@pytest.mark.parametrize(("options", "expected"), WEIGHTS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_weights_follow_the_gating_recipe(options: dict, expected: list[float], scale: float) -> None:
    out = identity_router([[2, 1, 0, -1]], oracle.Moe(4, 2, route_scale=scale, **options))
    assert out.ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(out.weights, [np.array(expected) * scale], rtol=1e-9)


def test_padding_does_not_enter_the_balance_loss() -> None:
    logits = [[2, 1, 0, 0], [2, 0, 1, 0], [1, 0, 0, 2], [0, 1, 2, 0], [0, 3, 3, 0], [0, 3, 3, 0]]
    other = [*logits[:4], [-5, 7, 1, 2], [9, 0, 0, 9]]
    real = np.array([True] * 4 + [False] * 2)
    moe = oracle.Moe(4, 2, aux_loss_coeff=1.0)
    for rows in (logits, other):
        out = identity_router(rows, moe, real_T=real, total=4.0)
        np.testing.assert_allclose(out.losses["load_balance"], 1.0837027303, rtol=1e-9)
        np.testing.assert_allclose(
            out.grads["x"][0], [0.0360302441, -0.0148096184, -0.0054481541, -0.0157724716], atol=1e-9
        )
        assert not out.grads["x"][4:].any()


def test_balance_loss_is_taken_per_layer_and_per_sequence() -> None:
    moe = oracle.Moe(2, 1)
    for logits in ([[2, 0]] * 4, [[0, 2]] * 4):
        np.testing.assert_allclose(identity_router(logits, moe).losses["load_balance"], 1.7615941560, rtol=1e-9)
    eight = [[1, 0], [0.5, 0], [2, 0], [1, 0], [0, 1], [0, 0.5], [3, 0], [0.25, 0]]
    np.testing.assert_allclose(identity_router(eight, moe, sequences=4).losses["load_balance"], 1.4584105260, rtol=1e-9)
    np.testing.assert_allclose(identity_router(eight, moe).losses["load_balance"], 1.1408257855, rtol=1e-9)


def test_z_loss_is_stable_for_large_logits() -> None:
    logits = [[12, 12, 0, 0], [100, 0, -100, 0], [-50, -50, -50, -50], [0, 0, 0, 0]]
    out = identity_router(logits, oracle.Moe(4, 2, z_loss_coeff=1.0))
    np.testing.assert_allclose(out.losses["z"], 3131.5825823313, rtol=1e-9)
    np.testing.assert_allclose(out.grads["x"][1], [50, 0, 0, 0], atol=1e-9)


def test_ties_go_to_the_lower_id_and_nan_comes_last() -> None:
    for row in itertools.product([0.0, 1.0], repeat=3):
        expected = sorted(range(3), key=lambda e: (-row[e], e))
        assert oracle.top_k(np.array([row]), 3).tolist() == [expected]
    assert oracle.top_k(np.array([[np.nan, 1, 0, 2]]), 2).tolist() == [[3, 1]]


def test_rank_without_rows_of_an_expert_gets_real_zeros() -> None:
    moe = oracle.Moe(2, 1, norm_topk_prob=False, activation="gelu")
    params = parameters(oracle.Moe(2, 1, activation="gelu"), False, False)
    params = {"w_router": np.eye(2, D).T, "w_up": params["w_up"][:2], "w_down": params["w_down"][:2]}
    x = np.abs(np.random.default_rng(0).normal(size=(4, D)))
    x[:, 1] = 0
    out = oracle.run(moe, params, oracle.Batch(x, 1, 4.0), np.ones((4, D)))
    assert (out.ids == 0).all()
    assert out.grads["w_up"].shape == (2, D, F)
    assert not out.grads["w_up"][1].any()
    assert not out.grads["w_down"][1].any()
    assert out.grads["w_up"][0].any()
