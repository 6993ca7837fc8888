"""The locality loss and its metrics: P7 and P8 of the sheet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.routing import locality
from twinmoe.moe_core.routing.base import RouterContext, Tokens
from twinmoe.testing.moe_core.routing.support import (
    context,
    finite_differences,
    gradients,
    loss_gradients,
    route,
    settings,
)

NODES = settings(num_experts=4, top_k=1, locality_nodes=2, locality_loss_coeff=1.0)
COUNTS = np.array([[3, 2, 2, 1], [1, 1, 2, 4]])


def close(a: object, b: object, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)  # type: ignore[arg-type]


def loss_of(home: Backend, rows_RE: Any, **fields: Any) -> float:
    """The loss of hard assignments: one sequence a node, tokens with probability 1 on their expert."""
    moe = NODES.model_copy(update=fields)
    shares = np.concatenate([np.repeat(np.eye(4), row, axis=0) for row in np.asarray(rows_RE)])
    ops = home.ops
    where = Tokens(2, float(len(shares)))
    value = locality.locality_loss(RouterContext(ops, moe, 8), ops.asarray(shares), where)
    return float(ops.to_numpy(value))


def test_the_sheets_two_nodes(home: Backend) -> None:
    close(loss_of(home, COUNTS), 0.397630)
    close(loss_of(home, [COUNTS[0], [2, 2, 2, 2]]), (0.527717 + 0.830366) / 2)
    close(loss_of(home, [[2, 2, 2, 2], COUNTS[1]]), (0.830366 + 0.267543) / 2)
    close(locality.hard_locality(COUNTS, NODES), 0.397630)


@pytest.mark.parametrize(("smoothing", "loss"), [(0.01, 0.872225), (0.05, 0.397630), (0.1, 0.218192)])
def test_smoothing(home: Backend, smoothing: float, loss: float) -> None:
    close(loss_of(home, COUNTS, locality_smoothing=smoothing), loss)


def test_extremes_are_ordered_and_finite(home: Backend) -> None:
    close(loss_of(home, [[2, 2, 2, 2]] * 2), 0.830366)
    close(loss_of(home, [[0, 0, 4, 4], [4, 4, 0, 0]]), 2.995732)
    close(loss_of(home, [[4, 4, 0, 0], [0, 0, 4, 4]]), 0.051293)
    close(loss_of(home, [[8, 0, 0, 0], [0, 0, 8, 0]]), 0.744440)
    close(loss_of(home, [[19, 19, 1, 1], [1, 1, 19, 19]]), 0.0)


def test_it_equals_the_joint_divergence_and_is_not_the_reverse_one() -> None:
    q, target = COUNTS / 16, locality.local_distribution(np.array([0, 0, 1, 1]), 2, 0.05) / 2
    close((q * np.log(q / target)).sum(), 0.397630)
    close((target * np.log(target / q)).sum(), 0.259705)


def test_chain_rule_of_a_node() -> None:
    q, e = COUNTS[0] / 8, 0.05
    inside = q[:2].sum()
    kl = lambda a, b: float((np.asarray(a) * np.log(np.asarray(a) / np.asarray(b))).sum())  # noqa: E731
    parts = kl([inside, 1 - inside], [1 - e, e]) + inside * kl(q[:2] / inside, [0.5, 0.5])
    close(parts + (1 - inside) * kl(q[2:] / (1 - inside), [0.5, 0.5]), 0.527717)


@pytest.mark.parametrize("held", [(0, 0, 0, 0), (1, 1, 1, 1)])
def test_a_node_with_none_or_all_of_the_experts_contributes_nothing(home: Backend, held: tuple[int, ...]) -> None:
    assert loss_of(home, COUNTS, locality_expert_nodes=held) == 0.0


def test_an_explicit_map_decides_what_is_local(home: Backend) -> None:
    crossed = {"locality_expert_nodes": (1, 1, 0, 0)}
    close(loss_of(home, COUNTS[::-1], **crossed), 0.397630)
    with pytest.raises(ValueError, match="must give each of the 4 experts a node from 0 to 1"):
        loss_of(home, COUNTS, locality_expert_nodes=(0, 0, 1, 2))


def test_it_does_not_fight_the_balance_loss(home: Backend) -> None:
    """Where every node uses its own experts evenly up to the smoothing, both losses are at their minimum."""
    moe = NODES.model_copy(update={"aux_loss_coeff": 1.0, "aux_loss_scope": "global", "top_k": 1})
    p = locality.local_distribution(np.array([0, 0, 1, 1]), 2, 0.05)
    routed = route(home, moe, np.log(np.repeat(p, 4, axis=0)), np.eye(4), sequences=2, total=8.0)
    close(routed.losses["locality"], 0.0)
    close(routed.losses["load_balance"], 1.0)


# --- P8: where the gradient goes -------------------------------------------------------------------
X = np.random.default_rng(0).standard_normal((6, 8))
GRAP = NODES.model_copy(update={"router": "grap", "aux_loss_coeff": 1.0, "aux_loss_scope": "global"})


@pytest.mark.parametrize("name", ["locality", "load_balance"])
def test_gradient_in_x_is_constant_inside_blocks_and_sums_to_zero(home: Backend, name: str) -> None:
    _, (dx,) = loss_gradients(home, GRAP, name, X, sequences=2)
    blocks = dx.reshape(6, 4, 2)
    close(blocks[..., 0], blocks[..., 1], 1e-12)
    assert np.abs(dx.sum(1)).max() < 1e-8
    assert np.abs(dx).max() > 1e-3


@pytest.mark.parametrize("scope", ["node", "sequence"])
def test_gradient_equals_finite_differences(home: Backend, scope: str) -> None:
    """The logarithm stands outside the graph; the gradient is the whole one nevertheless."""
    moe = GRAP.model_copy(update={"locality_scope": scope})
    _, (dx,) = loss_gradients(home, moe, "locality", X, sequences=2)

    def loss(x: np.ndarray) -> float:
        return route(home, moe, x, sequences=2).losses["locality"]

    close(dx, finite_differences(loss, X), 1e-8)


def test_descent_on_x_alone_makes_every_token_local(home: Backend) -> None:
    x = X.copy()
    first, _ = loss_gradients(home, GRAP, "locality", x, sequences=2)
    for _ in range(51):
        _, (dx,) = loss_gradients(home, GRAP, "locality", x, sequences=2)
        x = x - 5 * dx
    routed = route(home, GRAP, x, sequences=2)
    close([first, routed.losses["locality"]], [0.8130, 0.0036], 5e-5)
    assert locality.local_share(routed.statistics) == 1.0


def test_the_gradient_can_stay_in_the_router(home: Backend) -> None:
    w = np.random.default_rng(1).standard_normal((8, 4))
    apart = NODES.model_copy(update={"locality_gradient": "router"})
    value, (dx, dw) = loss_gradients(home, apart, "locality", X, w, sequences=2)
    whole, (dx_whole, dw_whole) = loss_gradients(home, NODES, "locality", X, w, sequences=2)
    close(value, whole, 1e-12)
    close(dw, dw_whole, 1e-12)
    assert not dx.any()
    assert np.abs(dx_whole).max() > 1e-3
    with pytest.raises(ValueError, match="has no parameters that could learn locality"):
        route(home, GRAP.model_copy(update={"locality_gradient": "router"}), X, sequences=2)


# --- homes and metrics -----------------------------------------------------------------------------
def test_homes_are_runs_of_the_global_batch() -> None:
    where = Tokens(3, 1.0, sequence_positions=np.array([0, 5, 7]), global_sequences=8)
    assert locality.home_nodes(where, 2).tolist() == [0, 1, 1]
    assert locality.home_nodes(Tokens(4, 1.0), 2).tolist() == [0, 0, 1, 1]


def test_sequence_scope_and_parts_of_a_batch_add_up(home: Backend) -> None:
    """Micro-batches of one sequence each, with their positions, give the loss of the whole batch."""
    moe, w = NODES.model_copy(update={"locality_scope": "sequence"}), np.random.default_rng(2).standard_normal((8, 4))
    whole = route(home, moe, X, w, sequences=3, total=6.0, global_sequences=3).losses["locality"]
    parts = [
        route(
            home, moe, X[2 * s : 2 * s + 2], w, total=6.0, sequence_positions=np.array([s]), global_sequences=3
        ).losses["locality"]
        for s in range(3)
    ]
    close(sum(parts), whole, 1e-12)


def test_local_share_counts_kept_rows_and_stands_beside_its_baseline(home: Backend) -> None:
    logits = np.concatenate([np.repeat(np.eye(4), row, axis=0) for row in COUNTS])
    routed = route(home, NODES, logits, np.eye(4), sequences=2)
    np.testing.assert_array_equal(routed.statistics["node_rows"].reshape(2, 2), [[5, 3], [2, 6]])
    assert locality.local_share(routed.statistics) == 0.6875
    assert locality.uniform_local_share(NODES) == 0.5
    padded = route(home, NODES, logits, np.eye(4), sequences=2, real_T=[False] + [True] * 15)
    np.testing.assert_array_equal(padded.statistics["node_rows"].reshape(2, 2), [[4, 3], [2, 6]])


@pytest.mark.parametrize(("nodes", "share"), [(8, 0.125), (16, 0.0625), (32, 0.03125)])
def test_baselines_of_the_papers_clusters(nodes: int, share: float) -> None:
    assert locality.uniform_local_share(settings(num_experts=16, locality_nodes=nodes)) == share


def test_the_pooled_loss_uses_the_ranks_of_the_context(home: Backend) -> None:
    """A context without ranks pools nothing."""
    ops = home.ops
    x = ops.asarray(np.ones(2))
    assert context(ops, NODES, 8).pooled(x) is x
    assert gradients(home, lambda o, a: (o.stop_gradient(a) * 2.0).sum(0) + a.sum(0), np.ones(2))[0] == 6.0
