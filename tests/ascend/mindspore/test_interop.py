"""The layer as `nn.Cell` in a network and a loop of MindSpore's own, one rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.moe_core.interop import (
    build_moe_layer,
    clip_grad_norm,
    expert_parameters,
    layer_state_dict,
    sync_gradients,
)
from twinmoe.testing.conftest import load_or_skip

HOME = load_or_skip("mindspore-cpu")

from mindspore import nn  # noqa: E402
from twinmoe.ascend.mindspore.autograd import value_and_grad  # noqa: E402
from twinmoe.ascend.mindspore.framework import ops  # noqa: E402

MOE = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 16}


class Network(nn.Cell):
    """Somebody's model: a projection, the layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Dense(8, 8)  # pyright: ignore[reportOptionalCall]
        self.moe = build_moe_layer(MOE, backend=HOME, hidden_size=8)
        self.head = nn.Dense(8, 3)  # pyright: ignore[reportOptionalCall]

    def construct(self, x: Any) -> Any:
        out = self.moe(self.before(x))
        return self.head(out.y), out.losses["load_balance"]


def training(network: Network, optimizer: Any) -> list[float]:
    rng = np.random.default_rng(0)
    x, target = (HOME.ops.asarray(rng.normal(size=s).astype(np.float32)) for s in ((32, 8), (32, 3)))

    model: Any = network

    def loss() -> Any:
        y, balance = model(x)
        return ((y - target) ** 2).mean(-1).mean(0) + balance * 0.01

    losses = []
    for _ in range(60):
        value, grads = value_and_grad(loss, optimizer.parameters)
        grads, _ = clip_grad_norm(network.moe, network, 5.0, grads)
        optimizer(grads)
        losses.append(float(value.asnumpy()))
    return losses


@pytest.fixture(scope="module")
def network() -> Network:
    return Network()


def test_a_network_with_the_layer_trains_with_mindspore_s_optimizer(network: Network) -> None:
    before = layer_state_dict(network.moe)
    losses = training(network, nn.Adam(network.trainable_params(), learning_rate=0.02))
    assert losses[-1] < 0.5 * losses[0]
    after = layer_state_dict(network.moe)
    assert before.keys() == after.keys()
    assert all(np.abs(after[name] - before[name]).max() > 0 for name in before)


def test_every_parameter_is_registered_once(network: Network) -> None:
    names = [p.name for p in network.trainable_params()]
    assert len(names) == len(set(names)) == 4 + 3
    assert {tuple(p.shape) for p in expert_parameters(network.moe)} == {(4, 8, 32), (4, 16, 8)}


def test_clipping_returns_the_global_norm_and_scales(network: Network) -> None:
    grads = tuple(ops.ones_like(p) for p in network.trainable_params())
    elements = sum(g.size for g in grads)
    clipped, norm = clip_grad_norm(network.moe, network, 1.0, grads)
    assert norm == pytest.approx(np.sqrt(elements), rel=1e-6)
    assert sum(float((g.asnumpy() ** 2).sum()) for g in clipped) == pytest.approx(1.0, rel=1e-5)


def test_gradients_must_be_handed_over(network: Network) -> None:
    with pytest.raises(ValueError, match="MindSpore keeps no gradients"):
        sync_gradients(network.moe)
    given = tuple(ops.ones_like(p) for p in expert_parameters(network.moe))
    found = sync_gradients(network.moe, given)
    assert all((f.asnumpy() == 1).all() for f in found)
