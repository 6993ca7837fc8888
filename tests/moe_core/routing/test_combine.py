"""From weights to outputs: field case D12."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from twinmoe.backends.registry import Backend
from twinmoe.testing.moe_core.routing.support import gate_logits, gradients, layer_output, settings


def test_every_order_of_four_bfloat16_rows_sums_to_260(home: Backend) -> None:
    """Accumulated in float32, cast once: 259 becomes 260 in bfloat16. Adding in bfloat16 would give 256."""
    ops = home.ops
    low = home.name in ("cpu", "cuda")  # the reference and MindSpore's host kernels have no bfloat16
    for order in set(itertools.permutations([1024.0, 4, 4, 4])):
        rows = ops.asarray(np.array(order, np.float32)[:, None])
        rows = ops.cast(rows, "bfloat16") if low else rows
        weights = ops.asarray(np.full((1, 4), 0.25, np.float32))
        index = ops.asarray(np.arange(4)[None])
        for _ in range(100):  # again and again: no order may differ
            y = ops.to_numpy(ops.combine_rows(rows, index, weights))
            assert y.tolist() == [[260.0 if low else 259.0]]


def test_weights_stay_with_their_experts(home: Backend) -> None:
    """A token that prefers expert 3 (0.7) to expert 1 (0.3): 37, not 73."""
    logits = np.log(np.array([[1e-9, 0.3, 1e-9, 0.7]]))
    routed = gate_logits(home, settings(num_experts=4, top_k=2), logits)
    assert routed.chosen.tolist() == [[3, 1]]
    np.testing.assert_allclose(layer_output(home, routed, [[1.0]], [0, 100, 0, 10]), [[37.0]], rtol=1e-12)


def test_gradients_of_repeated_rows_add(home: Backend) -> None:
    upstream = np.array([[1.0], [2], [4], [8]])

    def fn(ops: Any, x: Any) -> Any:
        return (ops.take_rows(x, ops.asarray(np.array([1, 0, 1, 0]))) * ops.asarray(upstream)).sum(0).sum(0)

    _, (dx,) = gradients(home, fn, np.ones((2, 1)))
    assert dx.tolist() == [[10.0], [5.0]]
