"""Kernels of narrow experts in the interpreter, float32, against torch formulas: values and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from twinmoe.cuda.kernels import grouping
from twinmoe.cuda.kernels.small import Narrow, NarrowSchedule, SmallMlp

ON = NarrowSchedule(Narrow(16, 32, 4, 2, 1), Narrow(16, 32, 4, 2, 1), Narrow(16, 32, 4, 2, 1), 3)


def dense(x, ids, weights, w_up, w_down):
    y = torch.zeros_like(x)
    for e in range(w_up.shape[0]):
        h = x @ w_up[e]
        gate, up = h.chunk(2, dim=-1)
        act = functional.silu(gate) * up if w_up.shape[2] == 2 * w_down.shape[1] else functional.gelu(h)
        y = y + (weights * (ids == e)).sum(1, keepdim=True) * (act @ w_down[e])
    return y


@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_narrow_experts_equal_dense_sum_with_skew_drops_and_empty_experts(gated: bool) -> None:
    g = torch.Generator().manual_seed(0)
    tokens, d, f, experts = 21, 64, 64, 6
    x = torch.randn(tokens, d, generator=g).requires_grad_()
    w_up = (torch.randn(experts, d, f * (2 if gated else 1), generator=g) / 8).requires_grad_()
    w_down = (torch.randn(experts, f, d, generator=g) / 8).requires_grad_()
    ids = torch.stack([torch.randperm(experts - 2, generator=g)[:2] for _ in range(tokens)])
    ids[: tokens // 2, 0], ids[: tokens // 2, 1] = 0, 3
    ids[1, 1] = -1
    weights = torch.rand(tokens, 2, generator=g).requires_grad_()
    grad = torch.randn(tokens, d, generator=g)
    leaves = [x, weights, w_up, w_down]
    y = SmallMlp.apply(x, weights, w_up, w_down, grouping.route_rows(ids, experts, ON.block_m), ON)
    want = dense(x, ids, weights, w_up, w_down)
    got = (y, *torch.autograd.grad(y, leaves, grad))
    for name, a, b in zip(
        ["y", "dx", "dweights", "dw_up", "dw_down"], got, (want, *torch.autograd.grad(want, leaves, grad))
    ):
        assert (a - b).norm() / b.norm() < 2e-6, name
    assert got[2][1, 1] == 0
    assert torch.equal(got[3][4:], torch.zeros_like(got[3][4:]))
    assert torch.equal(got[4][4:], torch.zeros_like(got[4][4:]))
