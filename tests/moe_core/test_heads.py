"""The layer of many heads: its function, its exchange, its names, what it refuses. Sheet B7: P3, P4, P5."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends import reference
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.backends.reference.tape import grad, variable
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.heads_exchange import HeadExchange, Heads
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.testing import oracle
from twinmoe.testing.moe_core.heads_harness import (
    MOE,
    WIDTH,
    Lone,
    alone,
    exchanges,
    logical,
    lone_layer,
    relative,
    runtime_of,
)

ops = reference.ops


def tokens_of(num: int, sequences: int = 1, **more: Any) -> Tokens:
    return Tokens(sequences=sequences, total=float(num), **more)


# --- what it computes ------------------------------------------------------------------------
def dense(layer: Lone, moe: MoeConfig, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """y and gradients by the oracle: every head is a dense masked MoE on its slice of x W_in."""
    p = {name: leaf.value for name, leaf in layer.leaves.items()}
    of = oracle.Moe(moe.num_experts, moe.top_k, activation=moe.activation, softmax_order="after_topk")
    u, d_z = x @ p["w_in"], dy @ p["w_out"].T
    d, experts, z, d_u = moe.head_dim or 0, moe.num_experts, np.zeros_like(u), np.zeros_like(u)
    grads = {name: np.zeros_like(value) for name, value in p.items()}
    for h in range(moe.num_heads):
        columns, rows = slice(h * d, (h + 1) * d), slice(h * experts, (h + 1) * experts)
        own = {"w_router": p["w_router"][h], "w_up": p["w_up"][rows], "w_down": p["w_down"][rows]}
        result = oracle.run(of, own, oracle.Batch(u[:, columns], 1, float(len(x))), d_z[:, columns])  # type: ignore[arg-type]
        z[:, columns], d_u[:, columns] = result.y, result.grads["x"]
        grads["w_router"][h] = result.grads["w_router"]
        grads["w_up"][rows], grads["w_down"][rows] = result.grads["w_up"], result.grads["w_down"]
    grads |= {"w_in": x.T @ d_u, "w_out": z.T @ dy, "x": d_u @ p["w_in"].T}
    return z @ p["w_out"], grads


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_layer_is_a_dense_masked_moe_per_head_between_two_projections(activation: str) -> None:
    moe = MOE.model_copy(update={"activation": activation})
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(10, WIDTH)), rng.normal(size=(10, WIDTH))

    def one(comm: Communicator) -> None:
        layer = lone_layer(moe, runtime_of(comm))
        leaf = variable(x)
        out = layer(leaf, tokens_of(10))
        names = list(layer.leaves)
        found = grad((out.y * ops.asarray(dy)).sum(-1).sum(-1), [*layer.leaves.values(), leaf])
        y, grads = dense(layer, moe, x, dy)
        assert relative(out.y.value, y, 0) < 1e-10
        for name, g in zip([*names, "x"], found, strict=True):
            assert relative(g, grads[name], 1e-3) < 1e-10, name

    alone(one)


def test_auxiliary_losses_are_means_over_heads_of_each_head_s_loss() -> None:
    moe = MOE.model_copy(update={"aux_loss_coeff": 1.0, "z_loss_coeff": 1.0})
    x = np.random.default_rng(1).normal(size=(12, WIDTH))
    real = np.arange(12) % 5 != 4

    def one(comm: Communicator) -> None:
        layer = lone_layer(moe, runtime_of(comm))
        out = layer(variable(x), Tokens(sequences=2, total=20.0, layers=3, real_T=ops.asarray(real)))
        u = x @ layer.leaves["w_in"].value
        of = oracle.Moe(4, 2, softmax_order="after_topk")
        want = {"load_balance": 0.0, "z": 0.0}
        for h in range(8):
            logits = u[:, h * 3 : h * 3 + 3] @ layer.leaves["w_router"].value[h]
            ids = np.where(real[:, None], oracle.top_k(logits, 2), -1)
            losses, _ = oracle.auxiliary(of, logits, ids, oracle.Batch(x, 2, 20.0, 3, real))  # type: ignore[arg-type]
            want = {name: want[name] + losses[name] / 8 for name in want}
        assert {name: float(v.value) for name, v in out.losses.items()} == pytest.approx(want, rel=1e-12)

    alone(one)


def test_shared_experts_see_the_whole_token() -> None:
    moe = MOE.model_copy(update={"num_shared_experts": 1})
    x = np.random.default_rng(2).normal(size=(5, WIDTH))

    def one(comm: Communicator) -> None:
        with_shared, without = lone_layer(moe, runtime_of(comm)), lone_layer(MOE, runtime_of(comm))
        p = {name: leaf.value for name, leaf in with_shared.leaves.items()}
        assert p["w_shared_up"].shape == (1, WIDTH, 5)
        more, _ = oracle.feed_forward(x, p["w_shared_up"][0], p["w_shared_down"][0], "gelu")
        y = with_shared(variable(x), tokens_of(5)).y.value
        np.testing.assert_allclose(y, without(variable(x), tokens_of(5)).y.value + more, atol=1e-12)

    alone(one)


# --- the exchange ----------------------------------------------------------------------------
def test_p4_rows_arrive_by_rank_and_token_with_the_heads_of_the_rank() -> None:
    def rank(comm: Communicator) -> list[list[float]]:
        heads = Heads(4, 1, 3, runtime_of(comm, head=2).groups["head"])
        exchange = HeadExchange(ops, comm, heads)
        u = 100.0 * comm.rank + 10 * np.arange(2)[:, None] + np.arange(4)[None]
        rows = exchange.split(ops.asarray(u))
        assert rows.shape == (8, 1)
        np.testing.assert_array_equal(exchange.merge(rows).value, u)
        return rows.value.reshape(4, 2).tolist()

    first, second = run_ranks(2, rank)
    assert first == [[0, 1], [10, 11], [100, 101], [110, 111]]
    assert second == [[2, 3], [12, 13], [102, 103], [112, 113]]


def test_p3_exactly_two_equal_exchanges_forward_and_two_backward_whatever_the_batch() -> None:
    def rank(comm: Communicator) -> list[Any]:
        layer = lone_layer(MOE, runtime_of(comm, head=4))
        logs = []
        for seed, scale in ((0, 1.0), (1, 30.0)):  # another routing, and a lopsided one
            x = variable(scale * np.random.default_rng([seed, comm.rank]).normal(size=(6, WIDTH)))
            mark = len(comm.log)
            out = layer(x, Tokens(1, 24.0, global_sequences=4))
            forward = len(comm.log)
            grad(out.y.sum(-1).sum(-1), [x, *layer.leaves.values()])
            logs.append((exchanges(comm, mark), forward - mark))
        return logs

    for logs in run_ranks(4, rank):
        assert logs[0] == logs[1]
        calls, forward = logs[0]
        assert forward == 2
        assert [(c.name, c.group) for c in calls] == [("all_to_all", "head")] * 4
        assert {c.bytes_sent for c in calls} == {6 * 24 * 8 * 3 // 4}


def test_p3_splits_and_buffers_of_the_sheet() -> None:
    tokens, ranks, width = 4096, 4, 2 * 128
    assert tokens * ranks * width * 2 == 8_388_608

    def rank(comm: Communicator) -> int:
        heads = Heads(8, 128, 1, runtime_of(comm, head=4).groups["head"])
        sent = HeadExchange(ops, comm, heads).split(ops.asarray(np.zeros((64, 1024))))
        assert sent.shape == (4 * 64 * 2, 128)
        return comm.log[-1].bytes_sent

    # 64 tokens of float64 stand for 4096 of bfloat16: 1/64 of the rows, 4 times the bytes
    assert {n * 64 // 4 for n in run_ranks(4, rank)} == {6_291_456}


def test_with_padding_one_mask_is_gathered_and_padding_tokens_are_not_computed() -> None:
    def rank(comm: Communicator) -> tuple[list[str], int, np.ndarray]:
        layer = lone_layer(MOE, runtime_of(comm, head=2))
        real = None if comm.rank == 0 else ops.asarray(np.arange(6) < 2)
        mark = len(comm.log)
        x = np.random.default_rng(comm.rank).normal(size=(6, WIDTH))
        out = layer(variable(x), Tokens(1, 8.0, real_T=real, global_sequences=2))
        assert out.stats is not None
        return [c.name for c in exchanges(comm, mark)], int(out.stats.chosen_E.value.sum()), out.y.value

    (names, chosen, _), (_, other, y) = run_ranks(2, rank)
    assert sorted(names) == ["all_gather", "all_to_all", "all_to_all"]
    assert chosen == other == 8 * 2 * 4  # real tokens x choices x heads of a rank
    assert not y[2:].any()
    assert y[:2].any()


def test_counts_cover_the_experts_of_all_heads_and_add_up_over_ranks() -> None:
    x = np.random.default_rng(3).normal(size=(12, WIDTH))

    def counts(comm: Communicator) -> np.ndarray:
        layer = lone_layer(MOE, runtime_of(comm, head=comm.size))
        mine = np.split(x, comm.size)[comm.rank]
        out = layer(variable(mine), tokens_of(12))
        assert out.stats is not None
        assert out.stats.bytes_sent == ({"head": 2 * mine.size * 2 * 8 * 0.5} if comm.size == 2 else {})
        return out.stats.statistics["chosen_E"].value

    whole = alone(counts)
    parts = run_ranks(2, counts)
    np.testing.assert_array_equal(sum(parts), whole)
    assert whole.shape == (32,)
    np.testing.assert_array_equal(whole.reshape(8, 4).sum(1), [24] * 8)
    assert not parts[0][16:].any()


# --- names and first values ------------------------------------------------------------------
@pytest.mark.parametrize(("head", "expert"), [(2, 1), (4, 1), (8, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("residency", ["owned", "fully_sharded"])
def test_first_values_are_those_of_one_process_whatever_the_layout(head: int, expert: int, residency: str) -> None:
    parallel = ParallelConfig.model_validate({"residency": residency})

    def values(comm: Communicator) -> dict[str, np.ndarray]:
        split = comm.size > 1
        layer = lone_layer(MOE, runtime_of(comm, head if split else 1, expert if split else 1), parallel)
        return logical(layer.parts, {p.name: p.initial() for p in layer.parts.parameters})

    whole = alone(values)
    assert {"moe.w_in", "moe.w_out", "moe.heads.7.w_router", "moe.heads.7.experts.3.w_up"} <= set(whole)
    seen: dict[str, list[np.ndarray]] = {}
    for rank in run_ranks(head * expert, values):
        for name, value in rank.items():
            seen.setdefault(name, []).append(value)
    assert set(seen) == set(whole)
    for name, copies in seen.items():
        if residency == "fully_sharded" and "experts" in name:
            joined = np.concatenate(copies)[: whole[name].size]
            np.testing.assert_array_equal(joined, whole[name].reshape(-1)[: len(joined)])
        else:
            for copy in copies:
                np.testing.assert_array_equal(copy, whole[name])


def test_heads_have_routers_and_experts_of_their_own() -> None:
    def values(comm: Communicator) -> dict[str, np.ndarray]:
        layer = lone_layer(MOE, runtime_of(comm))
        return logical(layer.parts, {p.name: p.initial() for p in layer.parts.parameters})

    whole = alone(values)
    drawn = [v for name, v in whole.items() if "heads" in name]
    assert len({v.tobytes() for v in drawn}) == len(drawn) == 8 * (1 + 4 * 2)


def test_the_second_matrices_of_experts_are_not_scaled_with_depth_but_w_out_is() -> None:
    from twinmoe.moe_core.build import LayerSpec, build_layer

    def spread(comm: Communicator) -> dict[str, float]:
        moe = MOE.model_copy(update={"head_dim": 64, "expert_hidden_size": 64})
        parts = build_layer(moe, ParallelConfig(), runtime_of(comm), LayerSpec(64, "moe.", std=0.02, std_down=0.005))
        return {p.name: float(p.initial().std()) for p in parts.parameters}

    found = alone(spread)
    assert found["moe.w_down"] == pytest.approx(0.02, rel=0.02)
    assert found["moe.w_out"] == pytest.approx(0.005, rel=0.02)


# --- refusals --------------------------------------------------------------------------------
def test_one_expert_a_token_is_refused_for_training_and_allowed_for_evaluation() -> None:
    def one(comm: Communicator) -> None:
        layer = lone_layer(MOE.model_copy(update={"top_k": 1}), runtime_of(comm))
        x = variable(np.ones((2, WIDTH)))
        assert layer(x, tokens_of(2, training=False)).y.shape == (2, WIDTH)
        with pytest.raises(ValueError, match=r"top_k=1 cannot be trained .* choose top_k >= 2"):
            layer(x, tokens_of(2))

    alone(one)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"head_dim": None}, "set it to the width of a head"),
        ({"router": "switch"}, "set moe.router=topk"),
        ({"score_function": "sigmoid"}, "set moe.score_function=softmax"),
        ({"norm_topk_prob": False}, "set moe.norm_topk_prob=true"),
        ({"num_groups": 2}, "set moe.num_groups=1"),
        ({"capacity_factor": 1.0}, "set moe.capacity_factor=null"),
        ({"aux_loss_layers": "concatenated"}, "set moe.aux_loss_layers=separate"),
        ({"router_jitter": 0.1}, "set moe.router_jitter=0"),
        ({"nan_policy": "skip"}, "set moe.nan_policy=raise"),
    ],
)
def test_what_heads_do_not_have_is_refused_with_the_remedy(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        alone(lambda comm: lone_layer(MOE.model_copy(update=fields), runtime_of(comm)))


def test_heads_that_ranks_cannot_share_equally_are_refused() -> None:
    with pytest.raises(ValueError, match="choose a head_parallel_size that divides num_heads"):
        run_ranks(3, lambda comm: lone_layer(MOE, runtime_of(comm, head=3)))
    with pytest.raises(ValueError, match=r"set parallel\.tensor_parallel_size=1"):
        run_ranks(2, lambda comm: lone_layer(MOE, make_runtime(ops, comm, Mesh.over(2, tensor=2))))


@pytest.mark.parametrize(
    ("fields", "said"), [({}, "or expert_parallel_size=1"), ({"aux_loss_scope": "global"}, "pools")]
)
def test_halves_are_refused_where_they_would_change_something(fields: dict[str, Any], said: str) -> None:
    moe = MOE.model_copy(update={"aux_loss_coeff": 0.01, **fields})
    parallel = ParallelConfig(head_chunks=2)
    head, expert = (2, 1) if fields else (1, 2)
    with pytest.raises(ValueError, match=said):
        run_ranks(2, lambda comm: lone_layer(moe, runtime_of(comm, head, expert), parallel))


def test_own_tokens_that_are_not_finite_are_named() -> None:
    def rank(comm: Communicator) -> tuple[np.ndarray, int]:
        layer = lone_layer(MOE, runtime_of(comm, head=2))
        x = np.random.default_rng(0).normal(size=(4, WIDTH))
        x[1] = np.nan if comm.rank else x[1]
        out = layer(variable(x), tokens_of(8), Memo())
        assert out.stats is not None
        assert out.stats.nan_T is not None
        return out.stats.nan_T.value, int(out.stats.statistics["nan_tokens"].value[0])

    (mine, none), (other, one) = run_ranks(2, rank)
    assert not mine.any()
    assert other.tolist() == [False, True, False, False]
    assert (none, one) == (0, 1)
