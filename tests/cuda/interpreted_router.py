"""The router kernels in the interpreter, float32, against torch formulas."""

from __future__ import annotations

import pytest
import torch
from twinmoe.cuda.kernels.router import Blocks, RouterTopk, Selection, split_weights

BLOCKS = Blocks(bm=16, be=32, bk=16, warps=4, stages=2)


def problem(rows: int = 37, heads: int = 3, width: int = 32, experts: int = 72):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, heads, width, generator=g).requires_grad_()
    w = torch.randn(heads, width, experts, generator=g).requires_grad_()
    bias = torch.randn(heads, experts, generator=g)
    return x, w, bias, torch.randn(rows, heads, 5, generator=g)


@pytest.mark.parametrize("biased", [False, True])
def test_chosen_logits_and_gradients_equal_the_dense_router(biased: bool) -> None:
    x, w, bias, grad = problem()
    choice = Selection(k=5)
    logits, ids = RouterTopk.apply(x, w, bias if biased else None, None, choice, BLOCKS)
    dense = torch.einsum("nhd,hde->nhe", x, w)
    scores = dense + (bias if biased else 0)
    want = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :5]
    assert torch.equal(ids, want)
    picked = torch.gather(dense, 2, want)
    torch.testing.assert_close(logits, picked, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(logits, [x, w], grad)
    for a, b in zip(got, torch.autograd.grad(picked, [x, w], grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_given_ids_get_the_bits_that_choosing_them_gave() -> None:
    x, w, bias, grad = problem(rows=20)
    choice = Selection(k=5)
    logits, ids = RouterTopk.apply(x, w, bias, None, choice, BLOCKS)
    again, same = RouterTopk.apply(x, w, None, ids, choice, BLOCKS)
    assert torch.equal(same, ids)
    assert torch.equal(again, logits)
    for a, b in zip(torch.autograd.grad(logits, [x, w], grad), torch.autograd.grad(again, [x, w], grad), strict=True):
        assert torch.equal(a, b)


def test_ties_go_to_the_lower_id_and_nan_counts_as_minus_infinity() -> None:
    x = torch.ones(4, 1, 16)
    w = torch.zeros(1, 16, 40)
    w[0, 0, [33, 7, 35]] = 1.0
    x[1] = float("nan")
    w[0, 1, 0] = float("-inf")
    _, ids = RouterTopk.apply(x, w, None, None, Selection(k=6), BLOCKS)
    assert ids[0, 0].tolist() == [7, 33, 35, 1, 2, 3]
    assert ids[1, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_three_bfloat16_terms_hold_a_float32() -> None:
    w = torch.randn(2, 16, 24)
    terms = split_weights(w, torch.bfloat16, "float32")
    assert terms.shape == (3, 2, 16, 32)
    assert torch.equal(terms.float().sum(0)[..., :24], w)
