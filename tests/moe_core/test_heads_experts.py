"""Experts of many heads: packed rows instead of attention. Sheet B7: P8, P9, P10 (parity); B4's precision trap."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twinmoe.backends import reference
from twinmoe.backends.reference.comm import Communicator
from twinmoe.backends.torch_shared import ops as torch_ops
from twinmoe.moe_core.build import LayerSpec, build_layer
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.routing.base import Routing
from twinmoe.moe_core.transport.flat import Local
from twinmoe.testing.moe_core.heads_harness import alone, runtime_of

Q = np.array([[1.0, -0.5]])
KEYS = np.array([[0.5, 1], [-2, 0.5], [1, 1]])
VALUES = np.array([[1.0, 0], [2, -1], [0.5, 3]])


def attention_form(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The published form: softmax of log(1 + gelu(s)), scaled back by exp(lse), minus the sum of values."""
    s = torch.log1p(torch.nn.functional.gelu((q @ keys.T).float()))
    lse = torch.logsumexp(s, -1, keepdim=True)
    out = (torch.softmax(s, -1) @ values.float()).to(q.dtype)
    return out, lse, out * lse.exp().to(q.dtype) - values.sum(0)


def ours(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    counts = torch.tensor([q.shape[0]])
    return torch_ops.expert_mlp(q, keys.T[None].contiguous(), values[None], counts, "gelu")


def test_p8_grouped_experts_give_what_the_attention_identity_recovers() -> None:
    q, keys, values = (torch.tensor(v) for v in (Q, KEYS, VALUES))
    s = q @ keys.T
    np.testing.assert_allclose(s, [[0, -2.25, 0.5]])
    np.testing.assert_allclose(torch.nn.functional.gelu(s), [[0, -0.027505, 0.345731]], atol=5e-7)
    out, lse, recovered = attention_form(q, keys, values)
    np.testing.assert_allclose(out, [[1.090298, 0.923595]], atol=5e-7)
    assert float(lse) == pytest.approx(1.199430, abs=5e-7)
    np.testing.assert_allclose(recovered, [[0.117855, 1.064699]], atol=5e-7)
    np.testing.assert_allclose(ours(q, keys, values), recovered, atol=1e-6)


def test_bfloat16_keeps_the_digits_that_the_attention_form_loses() -> None:
    """Scales at the start of training: sub-tokens 0.64, d_h = 128, d_e = 256, weights 0.02."""
    rng = np.random.default_rng(0)
    exact = [
        torch.tensor(rng.normal(size=s) * std)
        for s, std in (((256, 128), 0.64), ((256, 128), 0.02), ((256, 128), 0.02))
    ]
    rounded = [v.bfloat16() for v in exact]
    right = ours(*(v.double() for v in rounded))

    def error(y: torch.Tensor) -> float:
        return float((y.double() - right).norm() / right.norm())

    assert error(attention_form(*rounded)[2]) > 0.02
    assert error(ours(*rounded)) < 0.006


# --- packing ---------------------------------------------------------------------------------
def blocks(counts_HE: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The published packing: rows of each expert to a multiple of `block`, heads made equal on their last expert."""
    padded = -(-counts_HE // block) * block
    missing = padded.sum(1).max() - padded.sum(1)
    padded[:, -1] += missing
    return padded, padded // block


def test_p9_blocks_of_the_sheet_and_packing_without_them() -> None:
    counts = np.array([[130, 5, 0, 249], [128, 128, 128, 0]])
    padded, used = blocks(counts.copy(), 128)
    assert padded.tolist() == [[256, 128, 0, 256], [128, 128, 128, 256]]
    assert used.tolist() == [[2, 1, 0, 2], [1, 1, 1, 2]]
    assert padded.sum() == 1280  # rows computed there; here as many as were chosen:
    assert counts.sum() == 768
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(8), counts.reshape(-1)))
    rows, exchange = _packed(ids.reshape(-1, 1), 8)
    assert rows.shape[0] == 768
    np.testing.assert_array_equal(exchange.counts_C.value, counts.reshape(-1))


@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_unpack_of_pack_is_the_identity_and_no_row_is_padding(
    tokens: int, heads: int, experts: int, k: int, seed: int
) -> None:
    k, rng = min(k, experts), np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(experts)[:k] for _ in range(tokens * heads)])
    ids = chosen + np.tile(np.arange(heads), tokens)[:, None] * experts
    x = rng.normal(size=(tokens * heads, 2))
    rows, exchange = _packed(ids, heads * experts, x)
    assert rows.shape[0] == ids.size
    weights = np.zeros(ids.shape)
    weights[:, 0] = 1.0
    back = reference.ops.combine_rows(rows, exchange.position_TK, reference.ops.asarray(weights))
    np.testing.assert_array_equal(back.value, x)


def _packed(ids: np.ndarray, num: int, x: np.ndarray | None = None):
    ops = reference.ops
    ids_TK = ops.asarray(ids)
    routing = Routing(ids_TK, ids_TK, ops.asarray(np.ones(ids.shape)), {})
    return Local(ops, num).dispatch(ops.asarray(np.zeros((len(ids), 2)) if x is None else x), routing, None)


# --- sizes -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("heads", "experts", "hidden", "k", "routers"), [(8, 128, 256, 4, 131_072), (16, 256, 128, 8, 262_144)]
)
def test_p10_parameters_of_the_sheet(heads: int, experts: int, hidden: int, k: int, routers: int) -> None:
    moe = MoeConfig(
        num_heads=heads,
        head_dim=1024 // heads,
        num_experts=experts,
        top_k=k,
        expert_hidden_size=hidden,
        activation="gelu",
    )

    def sizes(comm: Communicator) -> dict[str, int]:
        parts = lone_layer_shapes(moe, comm)
        return {name: int(np.prod(shape)) for name, shape in parts.items()}

    found = alone(sizes)
    total = found["moe.w_up"] + found["moe.w_down"]
    assert total == 67_108_864
    assert total * k // experts == 2_097_152
    assert found["moe.w_router"] == routers
    assert found["moe.w_in"] + found["moe.w_out"] == 2_097_152
    assert comb(experts, k) ** heads > comb(experts, k)


def lone_layer_shapes(moe: MoeConfig, comm: Communicator) -> dict[str, tuple[int, ...]]:
    parts = build_layer(moe, ParallelConfig(), runtime_of(comm), LayerSpec(1024, "moe."))
    return {p.name: p.shape for p in parts.parameters}
