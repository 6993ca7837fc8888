"""What the host's operations promise beyond the contract: runs in pieces, NaN that stays put, few kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from twinmoe.backends.torch_shared import host_ops, host_products, ops
from twinmoe.backends.torch_shared.host_products import WIDTHS, outer_products, products, runs_of

D, F = 48, 40
SIZES = st.lists(st.sampled_from([0, 1, 24, 25, 63, 64, 65, 88, 89, 128, 200, 511, 512, 513, 540, 1100]), max_size=5)


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(host_products, "one_dnn_is_faster", lambda: request.param)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape)).to(dtype)


def worst(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, rest=st.integers(0, 40))
@pytest.mark.usefixtures("library")
def test_runs_of_any_length_are_multiplied_by_their_own_matrix(sizes: list[int], rest: int) -> None:
    sizes, rows = [*sizes, rest], sum(sizes) + rest
    x, d, w = normal(rows, D), normal(rows, F), normal(len(sizes) - 1, D, F)
    starts = np.cumsum([0, *sizes])
    runs = runs_of(x, w, torch.tensor(sizes[:-1], dtype=torch.int64))
    y, d_x, d_w = products(x, w, runs), products(d, w.transpose(1, 2), runs), outer_products(x, d, runs, w)
    for g in range(len(w)):
        run = slice(int(starts[g]), int(starts[g + 1]))
        assert worst(y[run], x[run].double() @ w[g].double()) < 1e-6
        assert worst(d_x[run], d[run].double() @ w[g].double().t()) < 1e-6
        assert worst(d_w[g], x[run].double().t() @ d[run].double()) < 2e-6
    assert not y[rows - rest :].any()


@pytest.mark.usefixtures("library")
def test_nan_of_a_neighbouring_run_stays_there() -> None:
    x, w = normal(200, D), normal(3, D, F)
    x[50:150] = torch.nan
    runs = runs_of(x, w, torch.tensor([50, 100, 50]))
    y = products(x, w, runs)
    assert y[:50].isfinite().all()
    assert y[150:].isfinite().all()
    assert outer_products(x, normal(200, F), runs, w)[[0, 2]].isfinite().all()


def test_one_dnn_sees_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()

    def watched(a: Tensor, b: Tensor) -> Tensor:
        seen.add((*a.shape, b.shape[0]))
        return a @ b.t()

    monkeypatch.setattr(host_products, "one_dnn_is_faster", lambda: True)
    monkeypatch.setattr(host_products, "_one_dnn_product", watched)
    for rows in range(1, 1500, 7):
        x, d, w = normal(rows, D), normal(rows, F), normal(1, D, F)
        runs = runs_of(x, w, torch.tensor([rows]))
        products(x, w, runs)
        outer_products(x, d, runs, w)
    assert 2 <= len(seen) <= 2 * len(WIDTHS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("holes", [False, True], ids=["all rows", "dropped and idle rows"])
def test_weighted_sums_are_those_of_the_plain_operations(dtype: torch.dtype, holes: bool) -> None:
    index = torch.randperm(40, generator=torch.Generator().manual_seed(0))[: 30 if holes else 40].reshape(10, -1)
    index = torch.where(index % 7 == 3, -1, index) if holes else index
    results = [_value_and_gradients(module, index, dtype) for module in (host_ops, ops)]
    for a, b in zip(*results, strict=True):
        assert worst(a, b) < (1e-14 if dtype == torch.float64 else 1e-6)
        assert ((a == 0) == (b == 0)).all()


def _value_and_gradients(module: Any, index: Tensor, dtype: torch.dtype) -> list[Tensor]:
    rows = normal(40, D, dtype=dtype).requires_grad_()
    weights = normal(*index.shape, dtype=dtype).requires_grad_()
    taken = module.take_rows(rows, index.reshape(-1))
    y = module.combine_rows(rows, index, weights)
    return [taken.detach(), y.detach(), *torch.autograd.grad((y * y).sum() + (taken * taken).sum(), (rows, weights))]


def test_experts_keep_their_input_and_one_product() -> None:
    x, w_up, w_down = normal(64, D).requires_grad_(), normal(2, D, 2 * F).requires_grad_(), normal(2, F, D)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        host_ops.expert_mlp(x, w_up, w_down.requires_grad_(), torch.tensor([30, 34]), "swiglu")
    assert sorted(t.numel() for t in kept) == sorted([x.numel(), w_up.numel(), w_down.numel(), 64 * 2 * F])
