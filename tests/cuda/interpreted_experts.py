"""Expert kernels in the interpreter, float32, against torch formulas: values and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from twinmoe.cuda.kernels import config, experts, grouping, launch
from twinmoe.cuda.kernels.config import Tile
from twinmoe.cuda.kernels.gather_sum import gather_sum

ON = launch.Card(3, config.SMALL)
COARSE = config.Schedule(
    up=Tile(32, 128, 64, 4, 2, pieces=4, flatten=False),
    down=Tile(32, 64, 64, 4, 2, pieces=2),
    act=Tile(32, 128, 64, 4, 2, pieces=8),
    dx=Tile(32, 128, 64, 4, 2, pieces=2),
    dw_up=Tile(64, 128, 64, 4, 2),
    dw_down=Tile(128, 64, 64, 4, 2),
)


def dense(x, ids, weights, w_up, w_down):
    y = torch.zeros_like(x)
    for e in range(w_up.shape[0]):
        h = x @ w_up[e]
        if w_up.shape[2] == 2 * w_down.shape[1]:
            gate, up = h.chunk(2, dim=-1)
            act = functional.silu(gate) * up
        else:
            act = functional.gelu(h)
        y = y + (weights * (ids == e)).sum(1, keepdim=True) * (act @ w_down[e])
    return y


def problem(seed: int, gated: bool, tokens: int = 37, f: int = 64):
    g = torch.Generator().manual_seed(seed)
    experts_, d = 6, 64
    x = torch.randn(tokens, d, generator=g).requires_grad_()
    w_up = (torch.randn(experts_, d, f * (2 if gated else 1), generator=g) / 8).requires_grad_()
    w_down = (torch.randn(experts_, f, d, generator=g) / 8).requires_grad_()
    ids = torch.stack([torch.randperm(experts_ - 2, generator=g)[:2] for _ in range(tokens)])
    ids[: tokens // 2, 0], ids[: tokens // 2, 1] = 0, 3
    ids[1, 1] = -1
    weights = torch.rand(tokens, 2, generator=g).requires_grad_()
    return x, ids, weights, w_up, w_down, torch.randn(tokens, d, generator=g)


def compare(got, want) -> None:
    for name, a, b in zip(("y", "dx", "dweights", "dw_up", "dw_down"), got, want, strict=True):
        error = (a - b).norm() / b.norm()
        assert error < 2e-6, f"{name}: {error}"


@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
@pytest.mark.parametrize("schedule", [config.SMALL, COARSE], ids=["small", "tiles_wider_than_f"])
def test_routed_layer_equals_dense_sum_with_skew_drops_empty_experts(gated: bool, schedule: config.Schedule) -> None:
    x, ids, weights, w_up, w_down, grad = problem(0, gated)
    routing = grouping.route_rows(ids, w_up.shape[0], schedule.block_m)
    y = experts.MoeMlp.apply(x, weights, w_up, w_down, routing, launch.Card(3, schedule))
    want = dense(x, ids, weights, w_up, w_down)
    leaves = [x, weights, w_up, w_down]
    got = torch.autograd.grad(y, leaves, grad)
    compare((y, *got), (want, *torch.autograd.grad(want, leaves, grad)))
    assert got[1][1, 1] == 0, "a dropped copy's routing weight has no gradient"
    assert torch.equal(got[2][4:], torch.zeros_like(got[2][4:]))
    assert torch.equal(got[3][4:], torch.zeros_like(got[3][4:]))


@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_sorted_rows_past_the_last_block_give_exact_zeros(gated: bool) -> None:
    x, _, _, w_up, w_down, grad = problem(1, gated)
    counts = torch.tensor([10, 0, 17, 5, 0, 0])
    ids = torch.cat([torch.repeat_interleave(torch.arange(6), counts), torch.full((5,), -1)])[:, None]
    rows = grouping.group_rows(counts, x.shape[0], ON.schedule.block_m)
    y = experts.SortedMlp.apply(x, w_up, w_down, rows, ON)
    ones = torch.ones(x.shape[0], 1)
    want = dense(x, ids, ones, w_up, w_down)
    leaves = [x, w_up, w_down]
    got, expected = (torch.autograd.grad(v, leaves, grad) for v in (y, want))
    for a, b in zip((y, *got), (want, *expected), strict=True):
        assert (a - b).norm() / b.norm() < 2e-6
    assert torch.equal(y[32:], torch.zeros(5, 64))
    assert torch.equal(got[0][32:], torch.zeros(5, 64))


def test_same_run_twice_is_bitwise_equal_and_a_nan_row_stays_in_its_expert() -> None:
    x, ids, weights, w_up, w_down, grad = problem(2, True)
    ids[:, 0], ids[:, 1] = 0, 1
    ids[7, 0], ids[7, 1] = 2, -1
    leaves = [x, weights, w_up, w_down]

    def run(x_):
        routing = grouping.route_rows(ids, w_up.shape[0], ON.schedule.block_m)
        y = experts.MoeMlp.apply(x_, weights, w_up, w_down, routing, ON)
        return (y, *torch.autograd.grad(y, [x_, *leaves[1:]], grad))

    first, second = run(x), run(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    poisoned = x.detach().clone()
    poisoned[7] = float("nan")
    bad = run(poisoned.requires_grad_())
    clean = [t for t in range(37) if t != 7]
    assert torch.equal(bad[0][clean], first[0][clean])
    assert torch.equal(bad[3][:2], first[3][:2])
    assert bad[0][7].isnan().all()


def test_only_wanted_gradients_are_computed() -> None:
    x, ids, weights, w_up, w_down, grad = problem(3, True)
    routing = grouping.route_rows(ids, w_up.shape[0], ON.schedule.block_m)
    y = experts.MoeMlp.apply(x.detach(), weights.detach(), w_up, w_down.detach(), routing, ON)
    want = dense(x, ids, weights, w_up, w_down)
    (got,) = torch.autograd.grad(y, [w_up], grad)
    (expected,) = torch.autograd.grad(want, [w_up], grad)
    assert (got - expected).norm() / expected.norm() < 2e-6


def test_gather_sum_adds_in_order_and_skips_minus_one() -> None:
    rows = torch.randn(10, 48)
    position = torch.tensor([[3, -1, 9], [0, 1, 2], [-1, -1, -1]], dtype=torch.int32)
    weights = torch.rand(3, 3)
    got = gather_sum(rows, position, weights)
    want = (rows[position.clamp(min=0)] * (weights * (position >= 0))[:, :, None]).sum(1)
    torch.testing.assert_close(got, want)
    assert torch.equal(got[2], torch.zeros(48))
