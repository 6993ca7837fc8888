"""On an NVIDIA card only: no waiting for the host, CUDA graphs, torch.compile, and both ways of the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch finds no NVIDIA GPU", allow_module_level=True)
from twinmoe.backends import registry
from twinmoe.backends.protocol import Launch
from twinmoe.cuda import ops as cuda_ops
from twinmoe.cuda.kernels.experts import moe_mlp
from twinmoe.cuda.kernels.router import Precision, Selection, router_topk, split_weights
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.config import ClusterConfig, LevelConfig, MoeConfig, ParallelConfig
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.moe_core.transformer import scoped
from twinmoe.testing.processes import free_port

BF16 = torch.bfloat16
PLAIN = {"num_experts": 16, "top_k": 4, "expert_hidden_size": 256}
HEADS = {**PLAIN, "num_heads": 4, "head_dim": 64, "softmax_order": "after_topk"}
Step = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@pytest.fixture(scope="module")
def comm() -> Iterator[Any]:
    made = registry.load("cuda", decided_by="test").comm.connect(Launch(port=free_port()))
    yield made
    made.close()


def layer_step(comm: Any, moe: dict[str, Any], whole: bool = True) -> tuple[Step, torch.Tensor]:
    """(step(x) -> y and all gradients, x) of a layer with 256 tokens of width 256."""
    runtime = make_runtime(
        cuda_ops, comm, Mesh(), ParallelConfig(), ClusterConfig(levels=(LevelConfig(name="host"),))  # type: ignore[arg-type]
    )  # fmt: skip
    config = MoeConfig.model_validate({**moe, "aux_loss_coeff": 0.0, "z_loss_coeff": 0.0})
    parts = build_layer(config, ParallelConfig(), runtime, LayerSpec(256, "moe.", checkpoint_experts=not whole))
    leaves = {
        p.name: torch.tensor(p.initial(), dtype=torch.float32 if p.master else BF16, device="cuda", requires_grad=True)
        for p in parts.parameters
    }
    x = torch.tensor(np.random.default_rng(0).normal(size=(256, 256)), dtype=BF16, device="cuda", requires_grad=True)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = parts.layer(scoped(leaves, "moe."), x, Tokens(2, 256.0), Memo()).y
        return y, *torch.autograd.grad(y, [x, *leaves.values()], torch.ones_like(y))

    return step, x


@pytest.mark.parametrize("moe", [PLAIN, HEADS], ids=["plain", "heads"])
def test_the_one_operation_gives_what_sorted_rows_give(comm: Any, moe: dict[str, Any]) -> None:
    (one, x), (sorted_rows, _) = layer_step(comm, moe), layer_step(comm, moe, whole=False)
    for a, b in zip(one(x), sorted_rows(x), strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


@pytest.mark.parametrize("moe", [PLAIN, HEADS], ids=["plain", "heads"])
def test_a_single_rank_never_waits_for_the_device(comm: Any, moe: dict[str, Any]) -> None:
    step, x = layer_step(comm, moe)
    step(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def problem(width: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """([x, weights, w_up, w_down], ids, gradient of y)."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device="cuda", dtype=BF16)

    ids = torch.rand(300, 8, generator=g, device="cuda").topk(2).indices
    weights = torch.rand(300, 2, generator=g, device="cuda")
    leaves = [normal(300, width), weights, normal(8, width, 512) / 16, normal(8, 256, width) / 16]
    return [leaf.requires_grad_() for leaf in leaves], ids, normal(300, width)


@pytest.mark.parametrize("width", [128, 256])
def test_experts_replay_in_a_cuda_graph_on_new_values(width: int) -> None:
    (x, weights, w_up, w_down), ids, grad = problem(width)

    def step() -> tuple[torch.Tensor, ...]:
        y = moe_mlp(x, ids, weights, w_up, w_down)
        return y, *torch.autograd.grad(y, [x, weights, w_up, w_down], grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        ids.copy_((ids + 3) % 8)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_a_compiled_model_holds_the_layer_without_breaks_and_takes_new_lengths_without_compiling() -> None:
    (x, weights, w_up, w_down), ids, grad = problem(256)
    compiled = 0

    def backend(graph: Any, _inputs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    def model(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return moe_mlp(x * 2, ids, weights, w_up, w_down).relu()

    whole = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for rows in (300, 200, 123):
        own = [t[:rows].detach().clone() for t in (x, ids, weights)]
        leaves = [own[0].requires_grad_(), own[2].requires_grad_(), w_up, w_down]
        y, want = whole(*own), model(*own)
        assert torch.equal(y, want)
        pairs = zip(*(torch.autograd.grad(v, leaves, grad[:rows]) for v in (y, want)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert compiled == 1
    inductor = torch.compile(model, fullgraph=True, dynamic=True)
    y = inductor(x, ids, weights)
    assert torch.equal(y, model(x, ids, weights))
    torch.autograd.grad(y, [x, weights, w_up, w_down], grad)


@pytest.mark.parametrize("groups", [1023, 1024, 8192])
def test_numbers_of_groups_around_the_limits_of_libraries(groups: int) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4096, 64, generator=g, device="cuda", dtype=BF16, requires_grad=True)
    w_up = (torch.randn(groups, 64, 128, generator=g, device="cuda", dtype=BF16) / 8).requires_grad_()
    w_down = (torch.randn(groups, 64, 64, generator=g, device="cuda", dtype=BF16) / 8).requires_grad_()
    ids = torch.randint(0, groups, (4096, 1), generator=g, device="cuda")
    y = moe_mlp(x, ids, torch.ones(4096, 1, device="cuda"), w_up, w_down)
    gate, up = torch.bmm(x[:, None].float(), w_up[ids[:, 0]].float())[:, 0].chunk(2, -1)
    want = torch.bmm((torch.nn.functional.silu(gate) * up)[:, None], w_down[ids[:, 0]].float())[:, 0]
    assert (y.float() - want).norm() <= 6e-3 * want.norm()
    sorted_rows = ids[:, 0].argsort(stable=True)
    counts = torch.bincount(ids[:, 0], minlength=groups)
    again = cuda_ops.expert_mlp(x[sorted_rows], w_up, w_down, counts, "swiglu")
    assert (again.float() - want[sorted_rows]).norm() <= 8e-3 * want.norm()


def test_router_choices_and_gradients_are_those_of_float64() -> None:
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(500, 3, 128, generator=g, device="cuda", dtype=BF16).requires_grad_()
    w = torch.randn(3, 128, 200, generator=g, device="cuda").requires_grad_()
    grad = torch.randn(500, 3, 6, generator=g, device="cuda")
    logits, ids = router_topk(x, w, None, Selection(6))
    exact = torch.einsum("nhd,hde->nhe", x.double(), w.double())
    assert torch.equal(ids, exact.sort(dim=-1, descending=True, stable=True).indices[..., :6])
    picked = torch.gather(exact, 2, ids)
    assert (logits - picked).norm() <= 1e-5 * picked.norm()
    again, _ = router_topk(x, w, None, Selection(6), ids)
    assert torch.equal(again, logits)
    for a, b, band in zip(
        torch.autograd.grad(logits, [x, w], grad), torch.autograd.grad(picked, [x, w], grad.double()), (4e-3, 2e-5)
    ):
        assert (a.double() - b.double()).norm() <= band * b.double().norm()


@pytest.mark.parametrize(
    "shape", [(300, 2, 128, 200, 8), (777, 1, 192, 65, 6), (513, 1, 2048, 1000, 16), (130, 3, 64, 128, 1)]
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bf16_fp32acc"])
def test_routers_of_many_experts_choose_the_best_and_given_ids_get_the_same_bits(
    shape: tuple[int, int, int, int, int], biased: bool, precision: Precision
) -> None:
    rows, heads, width, experts, k = shape
    g = torch.Generator("cuda").manual_seed(k)
    x = torch.randn(rows, heads, width, generator=g, device="cuda", dtype=BF16)
    w = torch.randn(heads, width, experts, generator=g, device="cuda") * width**-0.5
    bias = torch.randn(heads, experts, generator=g, device="cuda") if biased else None
    choice = Selection(k, precision)
    logits, ids = router_topk(x, w, bias, choice)
    exact = torch.einsum("nhd,hde->nhe", x.double(), split_weights(w, BF16, precision).double().sum(0)[..., :experts])
    scores = exact if bias is None else exact + bias
    best = scores.sort(dim=-1, descending=True, stable=True)
    assert (torch.gather(scores, 2, ids) - best.values[..., :k]).abs().max() <= 2e-4, "a worse one only within rounding"
    assert (ids != best.indices[..., :k]).any(-1).float().mean() <= 1e-2
    picked = torch.gather(exact, 2, ids)
    assert (logits - picked).norm() <= 1e-5 * picked.norm()
    again, _ = router_topk(x, w, None, choice, ids)
    assert torch.equal(again, logits)


@pytest.mark.parametrize("experts", [40, 128, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_router_ties_go_to_the_lower_id_and_nan_counts_as_minus_infinity(experts: int, biased: bool) -> None:
    x, w = torch.ones(300, 1, 128, device="cuda", dtype=BF16), torch.zeros(1, 128, experts, device="cuda")
    w[0, 0, [experts - 4, 7, 35]] = 1.0
    x[1] = float("nan")
    w[0, 1, 0] = float("-inf")
    bias = torch.zeros(1, experts, device="cuda") if biased else None
    _, ids = router_topk(x, w, bias, Selection(6, "bf16_fp32acc"))
    assert ids[0, 0].tolist() == [7, 35, experts - 4, 1, 2, 3]
    assert ids[1, 0].tolist() == [0, 1, 2, 3, 4, 5]
