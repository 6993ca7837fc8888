"""The layer as torch module: keywords, dtypes that the caller chose, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from twinmoe.moe_core import build_moe_layer

WIDTH = 16
REAL = torch.tensor([True, True, False, True, True, False])


def layer(**more: Any) -> Any:
    moe = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 8}
    return build_moe_layer(moe, backend="cpu", hidden_size=WIDTH, **more)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))


def test_inputs_may_be_named(x: torch.Tensor) -> None:
    ours = layer()
    assert torch.equal(ours(x=x, real=REAL).y, ours(x, REAL).y)
    assert torch.equal(ours(x, real=REAL).y, ours(x, REAL).y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_router_s_product_alone(x: torch.Tensor, dtype: torch.dtype) -> None:
    ours = layer()
    expected = ours(x)
    with torch.autocast("cpu", dtype=dtype):
        found = ours(x)
    assert torch.equal(found.y, expected.y)
    assert torch.equal(found.losses["load_balance"], expected.losses["load_balance"])


def test_a_layer_after_a_product_under_autocast_trains(x: torch.Tensor) -> None:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer(as_tensor=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    y.float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_are_converted_to_the_layer_and_the_output_back(x: torch.Tensor, given: torch.dtype) -> None:
    ours = layer()
    found = ours(x.to(given)).y
    assert found.dtype == given
    assert torch.equal(found, ours(x.to(given).float()).y.to(given))


def test_double_computes_in_float64(x: torch.Tensor) -> None:
    ours = layer().double()
    found = ours(x.double()).y
    assert found.dtype == torch.float64
    torch.set_default_dtype(torch.float64)
    try:
        built = layer()
    finally:
        torch.set_default_dtype(torch.float32)
    built.load_state_dict(ours.state_dict())
    assert torch.equal(found, built(x.double()).y)
    assert not torch.equal(found, layer()(x).y.double())


def test_bfloat16_computes_in_bfloat16(x: torch.Tensor) -> None:
    assert layer().to(torch.bfloat16)(x.bfloat16()).y.dtype == torch.bfloat16


def test_a_dtype_without_kernels_is_refused_at_the_next_call(x: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"does not compute in torch\.float16; use \.to"):
        layer().half()(x)
