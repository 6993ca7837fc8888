"""What MindSpore makes special in a trainer: its optimizers, its conversions of results, its recomputation."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from twinmoe.backends.protocol import Component, Launch, Parameter, TrainOptions
from twinmoe.testing.conftest import load_or_skip

HOME = load_or_skip("mindspore-cpu")
OPS, TRAINER = HOME.ops, HOME.trainer

import mindspore as ms  # noqa: E402
from twinmoe.ascend.mindspore import host_optimizer  # noqa: E402
from twinmoe.ascend.mindspore import optimizer as optimizer_of_every_device  # noqa: E402
from twinmoe.ascend.mindspore.autograd import value_and_grad  # noqa: E402
from twinmoe.ascend.mindspore.framework import mint  # noqa: E402

TOLERANCES = {"float32": 1e-6, "float64": 1e-13}


def build(component: Component, options: TrainOptions) -> Any:
    comm = HOME.comm.connect(Launch())
    return TRAINER.build([component], options, {"world": comm.group("world", [[0]])}, comm)


def quadratic(weight: np.ndarray) -> Component:
    parameters = (
        Parameter("w", weight.shape, lambda: weight),
        Parameter("b", (3,), lambda: np.ones(3), weight_decay=False),
    )
    return Component("model", parameters, lambda p, x: x @ p["w"] + p["b"])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("update", [host_optimizer.update, optimizer_of_every_device.update])
def test_ten_updates_equal_torch(update: Any, optimizer: Any, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    w, inputs = rng.normal(size=(4, 3)), rng.normal(size=(10, 5, 4))
    options = TrainOptions(dtype=dtype, beta1=0.8, beta2=0.97, eps=1e-3, weight_decay=0.13, optimizer=optimizer)
    state = build(quadratic(w), options)
    state.update = update
    tw, tb = (torch.tensor(v, dtype=getattr(torch, dtype), requires_grad=True) for v in (w, np.ones(3)))
    kinds: Any = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    extra: Any = {"betas": (0.8, 0.97), "eps": 1e-3} if optimizer == "adamw" else {}
    groups = [
        {"params": [tw], "weight_decay": 0.13 if optimizer == "adamw" else 0.0},
        {"params": [tb], "weight_decay": 0.0},
    ]
    theirs = kinds(groups, lr=0.0, **extra)
    if optimizer == "sgd":
        state.options = TrainOptions(dtype=dtype, weight_decay=0.0, optimizer="sgd")
    for step, values in enumerate(inputs.astype(dtype)):
        rate = 0.1 / (step + 1)
        x = OPS.asarray(values)
        TRAINER.accumulate(state, lambda x=x: (_square(state.modules["model"](x)), None))
        TRAINER.step(state, rate)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.zero_grad()
        ((torch.from_numpy(values) @ tw + tb) ** 2).sum().backward()
        theirs.step()
    found = {name: value for name, kind, value in TRAINER.tensors(state) if kind == "parameter"}
    for name, value in (("w", tw), ("b", tb)):
        np.testing.assert_allclose(found[name], value.detach().numpy(), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert np.abs(found["w"] - w).max() > 0.05


def _square(y: Any) -> Any:
    return (y * y).sum(0).sum(0)


def test_sgd_decays_weights_the_way_adamw_does_or_not_at_all() -> None:
    """SGD here is decoupled like AdamW: the gradient is not touched."""
    state = build(quadratic(np.ones((4, 3))), TrainOptions(dtype="float64", weight_decay=0.5, optimizer="sgd"))
    TRAINER.step(state, 0.1)
    found = {name: value for name, _, value in TRAINER.tensors(state)}
    np.testing.assert_allclose(found["w"], 0.95)
    np.testing.assert_allclose(found["b"], 1.0)


@dataclass(frozen=True)
class Remark:
    text: str
    counts: np.ndarray
    tensor: Any


def test_what_a_loss_returns_beside_itself_comes_through_untouched() -> None:
    state = build(quadratic(np.ones((4, 3))), TrainOptions())
    remark = Remark("kept", np.arange(3), None)

    def loss() -> tuple[Any, Any]:
        y = state.modules["model"](OPS.asarray(np.ones((2, 4), np.float32)))
        return _square(y), (remark, Remark("inner", remark.counts, y))

    value, (found, inner) = TRAINER.accumulate(state, loss)
    assert found is remark
    assert inner.counts is remark.counts
    assert OPS.to_numpy(value) == pytest.approx(150.0)
    assert OPS.to_numpy(inner.tensor).tolist() == [[5.0] * 3] * 2


def test_a_module_takes_and_returns_any_object() -> None:
    component = Component(
        "model", (Parameter("w", (2,), lambda: np.ones(2)),), lambda p, tag, y: Remark(tag, y, p["w"] * 2.0)
    )
    module = build(component, TrainOptions()).modules["model"]
    counts = np.arange(2)
    found = module("tag", counts)
    assert isinstance(found, Remark)
    assert (found.text, found.counts is counts) == ("tag", True)


def gradients_of(loss: Any, *weights: Any) -> list[np.ndarray]:
    return [OPS.to_numpy(g) for g in value_and_grad(loss, weights)[1]]


def test_recomputed_blocks_give_gradients_to_parameters_that_they_close_over() -> None:
    rng = np.random.default_rng(0)
    w, x, index = (
        ms.Parameter(OPS.asarray(rng.normal(size=(4, 4))), name="w"),
        ms.Parameter(OPS.asarray(rng.normal(size=(3, 4))), name="x"),
        OPS.asarray(np.array([2, -1, 0, 0, 2])),
    )
    calls = []

    def block(h: Any) -> Any:
        calls.append(1)
        rows = OPS.take_rows(mint.exp(h @ w), index)
        return OPS.logsumexp(OPS.grouped_matmul(rows, w.reshape((1, 4, 4)), OPS.asarray(np.array([5]))))

    plain = gradients_of(lambda: block(x * 2.0).sum(0), x, w)
    calls.clear()
    again = gradients_of(lambda: OPS.checkpoint(block, x * 2.0).sum(0), x, w)
    assert len(calls) == 2
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a).max() > 0


@pytest.mark.parametrize("recompute", [True, False])
def test_a_recomputed_block_keeps_no_saved_tensor_after_its_forward(recompute: bool) -> None:
    x = ms.Parameter(OPS.asarray(np.ones((2, 2))), name="x")
    inner: list[weakref.ref[np.ndarray]] = []
    alive: list[bool] = []

    def block(h: Any) -> Any:
        array = np.full((1, 2, 2), 3.0)
        inner.append(weakref.ref(array))
        return OPS.grouped_matmul(h, ms.Tensor.from_numpy(array), OPS.asarray(np.array([2])))

    def loss() -> Any:
        y = OPS.checkpoint(block, x * 1.0) if recompute else block(x * 1.0)
        gc.collect()
        alive.append(inner[0]() is not None)
        return y.sum(0).sum(0)

    (found,) = gradients_of(loss, x)
    np.testing.assert_array_equal(found, np.full((2, 2), 6.0))
    assert alive == [not recompute]


def test_bfloat16_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match="choose dtype float32 or float64 for mindspore-cpu"):
        build(quadratic(np.ones((4, 3))), TrainOptions(dtype="bfloat16"))


def test_a_tensor_of_another_shape_is_refused() -> None:
    state = build(quadratic(np.ones((4, 3))), TrainOptions())
    with pytest.raises(ValueError, match=r"parameter of w has shape \(3, 4\), the model wants \(4, 3\)"):
        TRAINER.load_tensors(state, [("w", "parameter", np.ones((3, 4)))], step=1)
