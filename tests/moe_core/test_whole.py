"""One operation in place of dispatch, compute and combine: when it is used, and that it is the same layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from twinmoe.backends.protocol import Launch
from twinmoe.backends.torch_shared import comm, ops
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.config import ClusterConfig, LevelConfig, MoeConfig, ParallelConfig
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.moe_core.transformer import scoped
from twinmoe.moe_core.whole import whole_layer

MOE = MoeConfig(num_experts=4, top_k=2, expert_hidden_size=8)


def dense(x: Any, ids: Any, weights: Any, w_up: Any, w_down: Any) -> Any:
    y = torch.zeros_like(x)
    for e in range(w_up.shape[0]):
        gate, up = (x @ w_up[e]).chunk(2, -1)
        y = y + (weights * (ids == e)).sum(1, keepdim=True) * ((torch.nn.functional.silu(gate) * up) @ w_down[e])
    return y


def output(routed: Any) -> torch.Tensor:
    own = SimpleNamespace(
        **{name: getattr(ops, name) for name in dir(ops)}, **({"routed_mlp": routed} if routed else {})
    )
    parallel, cluster = ParallelConfig(), ClusterConfig(levels=(LevelConfig(name="host"),))
    talk = comm.TorchCommunicator(Launch(), "gloo", torch.device("cpu"))
    runtime = make_runtime(own, talk, Mesh(), parallel, cluster)  # type: ignore[arg-type]
    parts = build_layer(MOE, parallel, runtime, LayerSpec(16, "moe."))
    params = scoped({p.name: torch.tensor(p.initial()) for p in parts.parameters}, "moe.")
    x = torch.randn(12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return parts.layer(params, x, Tokens(2, 12.0), Memo()).y


def test_the_operation_is_called_and_gives_the_same_layer() -> None:
    calls = []

    def routed(*args: Any) -> Any:
        calls.append(args)
        return dense(*args)

    torch.testing.assert_close(output(routed), output(None))
    assert len(calls) == 1


def test_shapes_that_it_does_not_take_go_the_usual_way() -> None:
    assert torch.equal(output(lambda *_: None), output(None))


@pytest.mark.parametrize(
    ("moe", "parallel", "ranks"),
    [
        ({}, {}, 2),
        ({}, {"residency": "borrowed"}, 1),
        ({}, {"max_rows_per_rank": 64}, 1),
        ({"expert_bias": True}, {}, 1),
    ],
    ids=["two_ranks", "borrowed", "row_budget", "biases"],
)
def test_it_is_for_one_rank_with_plain_experts_of_its_own(moe: Any, parallel: Any, ranks: int) -> None:
    own: Any = SimpleNamespace(routed_mlp=dense)
    assert whole_layer(MOE, ParallelConfig(), own, 1) is not None
    assert whole_layer(MOE.model_copy(update=moe), ParallelConfig().model_copy(update=parallel), own, ranks) is None
