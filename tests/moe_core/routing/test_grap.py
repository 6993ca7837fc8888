"""LocMoE's grouped average pooling: the sheet's P1 to P4, and its hazards."""

from __future__ import annotations

import numpy as np
import pytest
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.routing.grap import block_matrix
from twinmoe.testing.moe_core.routing.support import host_softmax, layer_output, route, settings

X = np.array([[1.0, 3, -2, 0, 4, 2, -1, -1]])
P1 = settings(router="grap", num_experts=4, top_k=1)


def close(a: object, b: object, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)  # type: ignore[arg-type]


def test_scores_are_block_means_and_the_winner_keeps_its_softmax(home: Backend) -> None:
    raw = route(home, P1, X)
    assert raw.chosen.tolist() == [[2]]
    close(raw.weights, [[0.711992]])
    relu = route(home, P1.model_copy(update={"score_relu": True}), X)
    assert relu.chosen.tolist() == [[2]]
    close(relu.weights, [[0.681453]])
    every = route(home, settings(router="grap", num_experts=4, top_k=4, norm_topk_prob=False), X)
    close(every.weights[0][np.argsort(every.chosen[0])], [0.261927, 0.013041, 0.711992, 0.013041])
    close(layer_output(home, raw, X, np.ones(4)), raw.weights * X, 1e-12)


def test_scores_equal_the_dense_matrix_whose_rows_are_orthogonal_and_of_equal_norm() -> None:
    w = block_matrix(8, 4)
    close(X @ w.T, [[2, -1, 3, -1]], 0)
    close(w @ w.T, 0.5 * np.eye(4), 0)
    close(np.linalg.norm(w, axis=1), 0.707107)
    cosines = (X @ w.T)[0] / (np.linalg.norm(w, axis=1) * np.linalg.norm(X))
    close(cosines, [0.471405, -0.235702, 0.707107, -0.235702])
    close((cosines**2).sum(), 0.833333)
    close(np.degrees(np.arccos(cosines)), [61.874, 103.633, 45.0, 103.633], 1e-3)


def test_the_gate_has_no_parameters_and_equals_a_learned_gate_with_the_block_matrix(home: Backend) -> None:
    x = np.random.default_rng(0).standard_normal((9, 8))
    pooled = route(home, settings(router="grap", num_experts=4, top_k=2), x)
    learned = route(home, settings(router="topk", num_experts=4, top_k=2), x, block_matrix(8, 4).T)
    np.testing.assert_array_equal(pooled.chosen, learned.chosen)
    close(pooled.weights, learned.weights, 1e-12)


def test_channels_that_do_not_divide_are_refused(home: Backend) -> None:
    with pytest.raises(ValueError, match="10 channels into 4 equal blocks"):
        route(home, P1, np.zeros((1, 10)))


def test_top_1_is_the_smallest_angle_and_survives_scaling_and_shifting(home: Backend) -> None:
    x = np.random.default_rng(1).standard_normal((50, 8))
    chosen = route(home, P1, x).chosen
    w = block_matrix(8, 4)
    cosines = x @ w.T / np.linalg.norm(w, axis=1)
    np.testing.assert_array_equal(chosen[:, 0], cosines.argmax(1))
    np.testing.assert_array_equal(route(home, P1, 7.5 * x).chosen, chosen)
    shifted = route(home, P1, X + 5)
    assert shifted.chosen.tolist() == [[2]]
    close(shifted.weights, [[0.711992]])
    assert route(home, P1, X - X.mean()).chosen.tolist() == [[2]]


def test_a_dense_gate_of_unequal_norms_need_not_choose_the_smallest_angle(home: Backend) -> None:
    w = np.array([[3.0, 0], [0.8, 0.6]]).T
    x = np.array([[0.8, 0.6]])
    assert route(home, settings(num_experts=2, top_k=1), x, w).chosen.tolist() == [[0]]
    assert int((x @ w / np.linalg.norm(w, axis=0)).argmax()) == 1


def test_relu_sends_a_token_without_a_positive_block_to_expert_0(home: Backend) -> None:
    x = -np.array([[3, 1, 0.5, 0.5, 2, 2, 4, 6]])
    assert route(home, P1, x).chosen.tolist() == [[1]]
    assert route(home, P1.model_copy(update={"score_relu": True}), x).chosen.tolist() == [[0]]


def test_relu_never_changes_the_winner_of_a_token_without_mean(home: Backend) -> None:
    x = np.random.default_rng(2).standard_normal((200, 8))
    x = x - x.mean(1, keepdims=True)
    relu = P1.model_copy(update={"score_relu": True})
    np.testing.assert_array_equal(route(home, P1, x).chosen, route(home, relu, x).chosen)


@pytest.mark.parametrize(("width", "experts", "low", "high"), [(256, 16, 0.060, 0.065), (512, 8, 0.123, 0.127)])
def test_isotropic_tokens_give_every_expert_its_share(width: int, experts: int, low: float, high: float) -> None:
    rng, w = np.random.default_rng(1), block_matrix(width, experts)
    counts, cosine, number = np.zeros(experts), 0.0, 0
    for _ in range(20):
        x = rng.standard_normal((10_000, width))
        scores = x.reshape(len(x), experts, -1).mean(-1)
        counts += np.bincount(scores.argmax(1), minlength=experts)
        cosine += (scores.max(1) / np.linalg.norm(x, axis=1)).sum() / np.linalg.norm(w[0])
        number += len(x)
    assert low < counts.min() / number
    assert counts.max() / number < high
    close(cosine / number, {256: 0.1106, 512: 0.0629}[width], 1e-3)


def test_raw_means_hide_a_collapse_that_the_scaled_ones_show() -> None:
    """Same choices; only the balance loss differs (d=512, n=8, one channel shifted by +40)."""
    from twinmoe.backends.registry import load

    x = np.random.default_rng(0).standard_normal((4000, 512))
    x[:, 7] += 40
    flat = settings(router="grap", num_experts=8, top_k=1, aux_loss_coeff=0.01)
    scaled = flat.model_copy(update={"score_scale": "sqrt"})
    seen, shown = route(load("reference"), flat, x), route(load("reference"), scaled, x)
    np.testing.assert_array_equal(seen.chosen, shown.chosen)
    assert (seen.chosen == 0).mean() > 0.998
    close(seen.losses["load_balance"], 1.68, 0.01)
    close(shown.losses["load_balance"], 7.20, 0.03)  # 7.213 in expectation


@pytest.mark.parametrize(("offset", "share"), [(10, 0.15), (20, 0.29), (50, 0.82), (100, 0.999)])
def test_one_outlier_channel_decides_the_routing(offset: float, share: float) -> None:
    x = np.random.default_rng(0).standard_normal((4000, 5120)).astype(np.float32)
    scores = x.reshape(4000, 16, -1).mean(-1)
    scores[:, 0] += offset * 16 / 5120
    close((scores.argmax(1) == 0).mean(), share, 0.02)


def test_a_flat_softmax_attenuates_the_layer() -> None:
    scores = np.random.default_rng(0).standard_normal((20_000, 16)) * np.sqrt(16 / 5120)
    close(host_softmax(scores).max(1).mean(), 0.0689, 2e-4)
