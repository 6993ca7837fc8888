"""Bytes of Head Parallel beside expert parallelism: the sheet's P1 and P2, and bytes counted from collectives."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.backends.reference.tape import grad, variable
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.heads_traffic import Layer, deduplicated, flat, head_parallel
from twinmoe.moe_core.routing.base import Tokens
from twinmoe.moe_core.shapes import shapes
from twinmoe.testing.moe_core.heads_harness import MOE, WIDTH, lone_layer, runtime_of

MB = 1e6


def sheet(k: int, ranks: int = 4) -> Layer:
    return Layer(tokens=4096, width=1024, ranks=ranks, top_k=k, experts=128, itemsize=2)


@pytest.mark.parametrize(
    ("k", "ep", "dedup"), [(1, 6.291, 6.291), (2, 12.583, 11.047), (4, 25.166, 17.329), (8, 50.332, 22.832)]
)
def test_p1_volume_by_choices(k: int, ep: float, dedup: float) -> None:
    layer = sheet(k)
    assert head_parallel(layer) / MB == pytest.approx(6.291, abs=5e-4)
    assert flat(layer) / MB == pytest.approx(ep, abs=5e-4)
    assert deduplicated(layer) / MB == pytest.approx(dedup, abs=5e-4)
    assert head_parallel(layer) / flat(layer) == 1 / k


@pytest.mark.parametrize(
    ("ranks", "hp", "ep"), [(2, 4.194, 16.777), (4, 6.291, 25.166), (8, 7.340, 29.360), (16, 7.864, 31.457)]
)
def test_p1_volume_by_ranks(ranks: int, hp: float, ep: float) -> None:
    assert head_parallel(sheet(4, ranks)) / MB == pytest.approx(hp, abs=5e-4)
    assert flat(sheet(4, ranks)) / MB == pytest.approx(ep, abs=5e-4)


def test_p2_bytes_that_leave_a_node() -> None:
    layer = sheet(8, ranks=8)
    found = [f(layer, 4) / MB for f in (head_parallel, flat, deduplicated)]
    assert found == pytest.approx([4.194, 33.554, 8.363], abs=5e-4)


@given(st.integers(1, 8), st.sampled_from([2, 4, 8]), st.integers(1, 8))
def test_head_parallel_never_sends_more_than_deduplicated_nor_that_than_flat(k: int, ranks: int, per_rank: int) -> None:
    experts = ranks * per_rank
    layer = Layer(64, 32, ranks, min(k, experts), experts)
    assert head_parallel(layer) <= deduplicated(layer) * (1 + 1e-12) <= flat(layer) * (1 + 1e-9)
    assert deduplicated(layer) <= layer.token_bytes * (ranks - 1)
    assert comb(experts, layer.top_k) > 0


def test_a_dry_run_knows_the_sheet_s_sizes() -> None:
    """latent_hp: 4 layers, 16 x 256 / 4 tokens a rank, 128 wide in float32, 4 ranks: 4 exchanges of 3/4 of the rows."""
    config = load_config("latent_hp")
    found = shapes(config, 4)
    assert found.bytes_per_step.dispatch_and_combine == 4 * 4 * 1024 * 128 * 4 * 3 // 4
    experts, projections, routers = 4 * 4 * 16 * 2 * 32 * 256, 4 * 2 * 128 * 128, 4 * 4 * 32 * 16
    attention, rest = 4 * (128 * 128 * 2 + 128 * 64 * 2), 257 * 128 + 9 * 128
    assert found.parameters_total == experts + projections + routers + attention + rest
    assert found.parameters_active == found.parameters_total - experts * 12 // 16


# --- counted from the collectives ------------------------------------------------------------
def exchanged(comm: Communicator, moe: MoeConfig, head: int, transport: str) -> list[int]:
    """Bytes of rows that this rank sends to others, forward and backward, all-to-all by all-to-all."""
    parallel = ParallelConfig.model_validate({"transport": transport})
    layer = lone_layer(moe, runtime_of(comm, head, comm.size // head), parallel)
    x = variable(np.random.default_rng(comm.rank).normal(size=(32, WIDTH)))
    mark = len(comm.log)
    out = layer(x, Tokens(1, 128.0, global_sequences=4))
    grad(out.y.sum(-1).sum(-1), [x, *layer.leaves.values()])
    return [c.bytes_sent for c in comm.log[mark:] if c.name == "all_to_all"]


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_counted_bytes_are_predicted_and_the_same_for_every_k(k: int) -> None:
    experts = MOE.model_copy(update={"num_experts": 16, "top_k": k, "head_dim": WIDTH // 4, "num_heads": 4})
    training = experts if k > 1 else experts.model_copy(update={"num_experts": 1})
    predicted = head_parallel(Layer(32, WIDTH, 4, k, 16, itemsize=8))
    for calls in run_ranks(4, lambda comm: exchanged(comm, training, 4, "flat")):
        assert calls == [predicted] * 4


@pytest.mark.parametrize("k", [2, 4])
def test_flat_expert_parallelism_sends_about_k_times_as_much(k: int) -> None:
    plain = MoeConfig(num_experts=16, top_k=k, expert_hidden_size=5, aux_loss_coeff=0.0)
    layer = Layer(32, WIDTH, 4, k, 16, itemsize=8)
    sent = run_ranks(4, lambda comm: exchanged(comm, plain, 1, "flat"))
    assert np.mean([calls[0] for calls in sent]) == pytest.approx(flat(layer), rel=0.15)
    assert np.mean([calls[0] for calls in sent]) > 0.8 * k * head_parallel(layer)
