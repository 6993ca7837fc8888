"""Experts in parts: with biases, and with the clamped activation, on every backend and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.config import MoeConfig
from twinmoe.moe_core.residency.feed_forward import activated, expert_rows, group_of_rows

COUNTS = np.array([2, 0, 3, 1])
ROWS, WIDTH, HIDDEN = 8, 4, 3  # two rows after the last block


def arrays(dtype: Any = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(ROWS, WIDTH), (4, WIDTH, 2 * HIDDEN), (4, HIDDEN, WIDTH), (4, 2 * HIDDEN), (4, WIDTH)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def by_hand(moe: MoeConfig) -> np.ndarray:
    x, w_up, w_down, b_up, b_down = arrays(np.float64)
    out = np.zeros((ROWS, WIDTH))
    for row, expert in enumerate(np.repeat(np.arange(4), COUNTS)):
        up = x[row] @ w_up[expert] + b_up[expert]
        gate, linear = up[:HIDDEN], up[HIDDEN:]
        if moe.activation == "swiglu_clamped":
            gate, linear = np.minimum(gate, moe.swiglu_limit), np.clip(linear, -moe.swiglu_limit, moe.swiglu_limit)
            act = gate / (1 + np.exp(-moe.swiglu_alpha * gate)) * (linear + 1)
        else:
            act = gate / (1 + np.exp(-gate)) * linear
        out[row] = act @ w_down[expert] + b_down[expert]
    return out


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    """To float32's precision at the largest value."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-7 * np.abs(wanted).max())


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamped"])
def test_biases_and_clamps_are_what_they_say(backend: Backend, activation: Any) -> None:
    moe = MoeConfig(num_experts=4, activation=activation, expert_bias=True, swiglu_limit=0.8)
    x, *stacks = (backend.ops.asarray(a) for a in arrays())
    out = expert_rows(backend.ops, moe, x, stacks, backend.ops.asarray(COUNTS))
    close(backend.ops.to_numpy(out), by_hand(moe))


def test_without_biases_plain_swiglu_in_parts_is_the_fused_operation(backend: Backend) -> None:
    moe = MoeConfig(num_experts=4)
    x, w_up, w_down, *_ = (backend.ops.asarray(a) for a in arrays())
    counts = backend.ops.asarray(COUNTS)
    fused = backend.ops.to_numpy(expert_rows(backend.ops, moe, x, [w_up, w_down], counts))
    up = backend.ops.grouped_matmul(x, w_up, counts)
    parts = backend.ops.grouped_matmul(activated(backend.ops, moe, up), w_down, counts)
    close(backend.ops.to_numpy(parts), fused)


def test_rows_know_their_block(backend: Backend) -> None:
    for counts, expected in (([2, 0, 3, 1], [0, 0, 2, 2, 2, 3, -1, -1]), ([0, 0, 0, 0], [-1] * ROWS)):
        found = group_of_rows(backend.ops, ROWS, backend.ops.asarray(np.array(counts)))
        assert backend.ops.to_numpy(found).tolist() == expected
