"""Numbers of the sheets that need more than one part: isotropic tokens, dense equality, worst cases, tables, chunks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table
from twinmoe.moe_core.routing import Memo, make_router
from twinmoe.moe_core.transport.flat import Local
from twinmoe.testing.moe_core.routing.support import (
    close,
    context,
    gate_logits,
    gradients,
    host_softmax,
    layer_output,
    route,
    settings,
    tokens,
)


# --- P3, P4: isotropic tokens through the router ---------------------------------------------------
@pytest.mark.parametrize(("width", "experts", "cosine"), [(256, 16, 0.1106), (512, 8, 0.0629)])
def test_isotropic_tokens_reach_every_expert_alike(home: Backend, width: int, experts: int, cosine: float) -> None:
    """10 000 tokens: shares within four standard errors of 1/n; the winning angle is that of the sheet."""
    x = np.random.default_rng(1).standard_normal((10_000, width))
    moe = settings(router="expert_token_resonance", num_experts=experts, top_k=1)
    routed = route(home, moe, x)
    scores = x.reshape(len(x), experts, -1).mean(-1)
    np.testing.assert_array_equal(routed.chosen[:, 0], scores.argmax(1))
    share = np.bincount(routed.chosen[:, 0], minlength=experts) / len(x)
    close(share, np.full(experts, 1 / experts), 4 * math.sqrt(1 / experts / len(x)))
    cosines = scores / np.linalg.norm(x, axis=1, keepdims=True) * math.sqrt(width / experts)
    close(cosines.max(1).mean(), cosine, 1e-3)
    close(cosines.std(), 1 / math.sqrt(width), 5e-4)
    np.testing.assert_array_equal(route(home, settings(router="grap", num_experts=experts, top_k=1), x).ids, routed.ids)


def test_a_token_without_mean_keeps_its_scores_less_the_mean(home: Backend) -> None:
    x = np.array([[1.0, 3, -2, 0, 4, 2, -1, -1]])
    routed = route(home, settings(router="grap", num_experts=4, top_k=4, norm_topk_prob=False), x - x.mean())
    by_expert = routed.weights[0][np.argsort(routed.chosen[0], kind="stable")]
    close(np.log(by_expert) - np.log(by_expert).mean(), [1.25, -1.75, 2.25, -1.75])
    assert routed.chosen[0].tolist() == [2, 0, 1, 3]


# --- P9, D2: what is kept is computed, what is dropped is nothing ----------------------------------
@pytest.mark.parametrize("policy", ["position", "score"])
@pytest.mark.parametrize("capacity", [1, 2, 3, 8])
def test_kept_rows_equal_the_masked_dense_layer(home: Backend, policy: str, capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    x, w, a = rng.standard_normal((8, 4)), rng.standard_normal((4, 4)), np.array([1.0, -2, 3, 5])
    moe = settings(num_experts=4, top_k=2, norm_topk_prob=False, capacity_factor=f"{capacity}/4", drop_policy=policy)
    routed = route(home, moe, x, w)
    p = host_softmax(x @ w)
    kept = (routed.ids[:, :, None] == np.arange(4)).any(1)
    close(layer_output(home, routed, x, a), (np.where(kept, p, 0) * a).sum(1, keepdims=True) * x, 1e-12)
    load = np.bincount(routed.chosen.reshape(-1), minlength=4)
    assert kept.sum() + np.maximum(load - capacity, 0).sum() == 16
    assert kept.sum(0).max() <= capacity
    if capacity == 8:
        best = np.argsort(-p, axis=1)[:, :2]
        np.testing.assert_array_equal(kept, (best[:, :, None] == np.arange(4)).any(1))


@pytest.mark.parametrize(("policy", "survivors"), [("position", [0, 1]), ("score", [1, 3])])
def test_dropped_tokens_give_the_expert_no_gradient(home: Backend, policy: str, survivors: list[int]) -> None:
    """D2: y = p_0 a_0 x for the two that are kept, so d(sum y)/d a_0 is their p_0 x and nothing else."""
    logits, x = np.zeros((5, 4)), np.arange(1.0, 6)[:, None]
    logits[:, 0] = [1, 3, 0.5, 2, 1.5]
    p = np.array([0.4753668864, 0.8700485066, 0.3546612444, 0.7112345942, 0.5990210270])
    moe = settings(num_experts=4, top_k=1, capacity_factor=1.0, drop_policy=policy)

    def fn(ops: Any, a_E1: Any, x_TD: Any) -> Any:
        router = make_router(context(ops, moe, 4))
        params = {"w_router": ops.asarray(np.eye(4))}
        routing = router.route(params, ops.asarray(logits), tokens(ops, 5), Memo())
        transport = Local(ops, 4)
        rows, exchange = transport.dispatch(x_TD, routing, None)
        expert_N = np.repeat(np.arange(4), ops.to_numpy(exchange.counts_C))
        expert_N = np.concatenate([expert_N, np.zeros(rows.shape[0] - len(expert_N), np.int64)])
        scaled = rows * ops.take_rows(a_E1, ops.asarray(expert_N))
        return transport.combine(scaled, routing.weights_TK, exchange).sum(-1).sum(-1)

    _, (d_a, d_x) = gradients(home, fn, np.array([[10.0], [20], [30], [40]]), x)
    close(d_a[:, 0], [(p * x[:, 0])[survivors].sum(), 0, 0, 0])
    close(d_x[:, 0], np.where(np.isin(np.arange(5), survivors), 10 * p, 0))


@pytest.mark.parametrize(("k", "rows"), [(8, 262_144), (2, 65_536)])
def test_the_most_rows_that_a_rank_can_hold(k: int, rows: int) -> None:
    """D2, bounded memory: R T min(k, E_local) where all choose the experts of rank 0; R T k / R where balanced."""
    table = slot_table(owners(64, 8), 8)
    worst, even = np.zeros((8, 64), np.int64), np.full((8, 64), 4096 * k // 64)
    worst[:, :k] = 4096
    for counts, most in ((worst, rows), (even, 4096 * k)):
        assert plan_static(counts, table).flow.sum(0).reshape(8, -1).sum(1).max() == most


# --- D3: one capacity for ranks of different length, on every backend ------------------------------
@pytest.mark.parametrize("factor", ["1.25", None])
@pytest.mark.parametrize(
    ("first", "number", "y"),
    [(1, 7, [3.25, 650, 9.75, 1300, 16.25, 1950, 22.75]), (8, 3, [26, 2925, 32.5]), (8, 0, [])],
)
def test_a_short_rank_uses_the_capacity_of_the_longest(
    home: Backend, factor: str | None, first: int, number: int, y: list[float]
) -> None:
    """Capacity 5 for all, where the short rank's own would be 2; dropless gives the same."""
    others = SimpleNamespace(gather_to_host=lambda own, group: np.array([[7], [number]]))
    moe = settings(num_experts=4, top_k=2, capacity_factor=factor, capacity_group="rank", drop_policy="position")
    even = (np.arange(number) % 2 == 0)[:, None]
    high, low = math.log(0.75), math.log(0.25)
    logits = np.where(even, [[high, low, -50, -50]], [[-50, -50, high, low]])
    routed = gate_logits(home, moe, logits, comm=others, group=SimpleNamespace(size=2))
    assert (routed.ids >= 0).all()
    close(
        layer_output(home, routed, np.arange(first, first + number, dtype=float)[:, None], [1, 10, 100, 1000])[:, 0], y
    )


# --- PanGu-Sigma: balanced by ids, not by frequency -------------------------------------------------
def test_a_balanced_table_under_zipf_ids_loads_experts_as_the_sheet_says(home: Backend) -> None:
    """Three ids each, loads 0.333, 0.180, 0.097, 0.389."""
    table = np.array([3, 0, 0, 1, 0, 1, 1, 3, 2, 2, 2, 3])
    frequency = 1 / np.arange(1, 13)
    ids = np.repeat(np.arange(12), np.round(27_720 * frequency).astype(int))
    load = home.ops.to_numpy(home.ops.count(home.ops.take_rows(home.ops.asarray(table), home.ops.asarray(ids)), 4))
    assert np.bincount(table).tolist() == [3, 3, 3, 3]
    close(load / load.sum(), [0.333, 0.180, 0.097, 0.389], 6e-4)


# --- P10: chunks on one communication and one compute lane -------------------------------------------
def makespan(order: list[tuple[str, int]], seconds: dict[str, float]) -> float:
    """End of the last task: lanes run their tasks in this order; d, f, c of a chunk wait for one another."""
    lane, done = {"comm": 0.0, "compute": 0.0}, {}
    for task, chunk in order:
        where, before = "compute" if task == "f" else "comm", {"f": "d", "c": "f"}.get(task)
        lane[where] = max(lane[where], done.get((before, chunk), 0.0)) + seconds[task]
        done[task, chunk] = lane[where]
    return max(done.values())


def issued(chunks: int) -> list[tuple[str, int]]:
    """The layer's order (test_rounds holds it): rows of the next chunk leave before a chunk is computed."""
    order = [("d", 0)]
    for n in range(chunks):
        order += ([("d", n + 1)] if n + 1 < chunks else []) + [("f", n), ("c", n)]
    return order


@pytest.mark.parametrize(("chunks", "ideal", "ours"), [(1, 14, 14), (2, 10, 10), (4, 8, 9)])
def test_chunks_shorten_the_layer(chunks: int, ideal: int, ours: int) -> None:
    """Dispatch 4, experts 6, combine 4: the sheet sends all chunks ahead; we send one ahead, to hold fewer rows."""
    seconds = {"d": 4 / chunks, "f": 6 / chunks, "c": 4 / chunks}
    ahead = [("d", n) for n in range(chunks)] + [(task, n) for n in range(chunks) for task in "fc"]
    assert makespan(ahead, seconds) == ideal
    assert makespan(issued(chunks), seconds) == ours
    assert ideal >= max(8, 6 + 8 / chunks)
