"""Routers of many heads: streaming top-k, its gradient, its memory, its bias. Sheet B7: P6, P7, P10."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from twinmoe.backends import reference, streaming
from twinmoe.backends.protocol import Ops
from twinmoe.backends.reference.comm import Communicator
from twinmoe.backends.reference.tape import grad, variable
from twinmoe.backends.torch_shared import ops as torch_ops
from twinmoe.backends.torch_shared import router as torch_router
from twinmoe.moe_core.heads_router import HeadsRouter
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.testing.moe_core.heads_harness import MOE, WIDTH, alone, lone_layer, runtime_of

SHEET_X = np.array([[[1.0, 2.0]]])
SHEET_W = np.array([[[0.5, -1, 2], [0.5, 0.6, -0.6]]])


class Streaming:
    """Operations of a home whose `router_topk` is the one composed of the others."""

    def __init__(self, home: Any) -> None:
        self._home = home

    def __getattr__(self, name: str) -> Any:
        return getattr(self._home, name)

    def router_topk(self, x: Any, w: Any, bias: Any, k: int, ids: Any = None) -> tuple[Any, Any]:
        return streaming.router_topk(self._home, x, w, bias, k, ids)


HOMES = {"reference": reference.ops, "torch": torch_ops, "streaming": Streaming(reference.ops)}


@pytest.fixture(params=list(HOMES))
def ops(request: pytest.FixtureRequest) -> Ops:
    return HOMES[request.param]


@pytest.fixture(params=[2, 3, 6, 512])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Experts a tile, and few rows at a time."""
    for module in (streaming, torch_router):
        monkeypatch.setattr(module, "TILE", request.param)
        monkeypatch.setattr(module, "ROWS", 8)
    return request.param


def ids_of_scores(ops: Ops, scores_NE: np.ndarray, k: int) -> np.ndarray:
    """Choices of a router whose scores are given: one channel, x = 1, would not vary by token, so x is one-hot."""
    x = ops.asarray(np.eye(len(scores_NE))[:, None, :])
    return ops.to_numpy(ops.router_topk(x, ops.asarray(scores_NE[None]), None, k)[1])[:, 0]


# --- choosing --------------------------------------------------------------------------------
def test_p6_ties_go_to_the_lower_id_for_every_tile(ops: Ops, tile: int) -> None:
    assert ids_of_scores(ops, np.array([[1.0, 3, -2, 3, 2.5, 0]]), 2).tolist() == [[1, 3]]


@pytest.mark.parametrize("home", ["torch", "streaming"])
@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_p6_tiles_choose_what_a_stable_sort_chooses(home: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (streaming, torch_router):
        monkeypatch.setattr(module, "TILE", size)
    scores = np.random.default_rng(0).integers(-20, 20, (300, 64)) / 4.0
    want = np.argsort(-scores, axis=1, kind="stable")[:, :8]
    np.testing.assert_array_equal(ids_of_scores(HOMES[home], scores, 8), want)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_homes_agree_on_ids_logits_and_gradients_exactly_for_small_integers(data: st.DataObject) -> None:
    rows, heads, width, num = (data.draw(st.integers(1, n)) for n in (9, 3, 4, 12))
    k, seed = data.draw(st.integers(1, num)), data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    x, w = rng.integers(-2, 3, (rows, heads, width)) * 1.0, rng.integers(-2, 3, (heads, width, num)) * 1.0
    bias = rng.integers(-1, 2, (heads, num)) * 1.0 if data.draw(st.booleans()) else None
    g = rng.integers(-3, 4, (rows, heads, k)) * 1.0
    leaves = variable(x), variable(w)
    logits, ids = reference.ops.router_topk(*leaves, None if bias is None else reference.ops.asarray(bias), k)
    dx, dw = grad(logits, list(leaves), g)
    tx, tw = torch.tensor(x, requires_grad=True), torch.tensor(w, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_router, "TILE", data.draw(st.integers(1, 13)))
        patch.setattr(torch_router, "ROWS", 5)
        found, chosen = torch_ops.router_topk(tx, tw, None if bias is None else torch.tensor(bias), k)
        found.backward(torch.tensor(g))
        one_hot = torch_router.weight_gradient(tx.detach(), tw.detach(), chosen, torch.tensor(g))
    assert tx.grad is not None
    assert tw.grad is not None
    for a, b in ((chosen, ids.value), (found.detach(), logits.value), (tx.grad, dx), (tw.grad, dw), (one_hot, dw)):
        np.testing.assert_array_equal(a.numpy(), b)


# --- gradients -------------------------------------------------------------------------------
def test_p7_gradients_of_the_sheet(ops: Ops, tile: int) -> None:
    """L = w_0 of weights = softmax(chosen logits)."""
    values, (dx, dw) = _weights_and_gradients(ops, SHEET_X, SHEET_W, None)
    logits, ids, weights = values
    np.testing.assert_array_equal(ids, [[[0, 2]]])
    np.testing.assert_allclose(logits, [[[1.5, 0.8]]], atol=1e-12)
    np.testing.assert_allclose(weights, [[[0.66819, 0.33181]]], atol=5e-6)
    np.testing.assert_allclose(dx, [[[-0.33257, 0.24388]]], atol=5e-6)
    np.testing.assert_allclose(dw[0, :, 0], [0.22171, 0.44343], atol=1e-5)
    np.testing.assert_allclose(dw[0, :, 2], -dw[0, :, 0], atol=1e-15)
    assert not dw[0, :, 1].any()


def test_p7_a_bias_changes_who_is_chosen_and_clean_logits_weigh(ops: Ops, tile: int) -> None:
    (logits, ids, weights), _ = _weights_and_gradients(ops, SHEET_X, SHEET_W, np.array([[0, 0.7, 0]]))
    np.testing.assert_array_equal(ids, [[[0, 1]]])
    np.testing.assert_allclose(logits, [[[1.5, 0.2]]], atol=1e-12)
    np.testing.assert_allclose(weights, [[[0.78583, 0.21417]]], atol=5e-6)


def _weights_and_gradients(ops: Ops, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None) -> Any:
    on_torch = ops is torch_ops
    leaf: Any = (lambda v: torch.tensor(v, requires_grad=True)) if on_torch else variable
    leaves = [leaf(x), leaf(w)]
    logits, ids = ops.router_topk(leaves[0], leaves[1], None if bias is None else ops.asarray(bias), 2)
    weights = ops.softmax(logits)
    first = ops.split(weights, [1, 1], 2)[0].sum(0).sum(0).sum(0)
    grads = torch.autograd.grad(first, leaves) if on_torch else grad(first, leaves)
    return [ops.to_numpy(v) for v in (logits, ids, weights)], [np.asarray(g) for g in grads]


def test_p7_one_choice_gives_weight_one_and_no_router_gradient() -> None:
    def one(comm: Communicator) -> None:
        layer = lone_layer(MOE.model_copy(update={"top_k": 1}), runtime_of(comm))
        x = variable(np.random.default_rng(0).normal(size=(5, WIDTH)))
        out = layer(x, Tokens(1, 5.0, training=False))
        assert not grad(out.y.sum(-1).sum(-1), [layer.leaves["w_router"]])[0].any()

    alone(one)


def test_gradients_repeat_bit_by_bit_and_replay_is_the_same_decision() -> None:
    rng = np.random.default_rng(4)
    x, w = (torch.tensor(rng.normal(size=s), dtype=torch.float32) for s in ((300, 2, 16), (2, 16, 100)))
    g = torch.tensor(rng.normal(size=(300, 2, 4)), dtype=torch.float32)

    def run(ids: torch.Tensor | None) -> list[bytes]:
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        logits, chosen = torch_ops.router_topk(a, b, None, 4, ids)
        logits.backward(g)
        assert a.grad is not None
        assert b.grad is not None
        return [t.detach().numpy().tobytes() for t in (logits, chosen, a.grad, b.grad)]

    first = run(None)
    assert run(None) == first
    assert run(torch_ops.router_topk(x, w, None, 4)[1]) == first


def test_bfloat16_tokens_are_scored_in_float32() -> None:
    rng = np.random.default_rng(5)
    x = torch.tensor(rng.normal(size=(64, 2, 32)), dtype=torch.bfloat16)
    w = torch.tensor(rng.normal(size=(2, 32, 64)), dtype=torch.float32)
    logits, ids = torch_ops.router_topk(x, w, None, 4)
    exact = torch.einsum("nhd,hde->nhe", x.double(), w.double())
    assert logits.dtype == torch.float32
    np.testing.assert_array_equal(ids, exact.topk(4).indices)
    np.testing.assert_allclose(logits, exact.gather(2, ids), rtol=1e-5)


# --- memory ----------------------------------------------------------------------------------
class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def activation_bytes(tokens: int, heads: int, dim: int, num: int, k: int) -> tuple[int, int]:
    """(bytes saved for backward besides parameters, elements of the largest tensor forward or backward)."""
    x = torch.randn(tokens, heads, dim, requires_grad=True)
    w = torch.randn(heads, dim, num, requires_grad=True)
    saved: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() != w.data_ptr():
            saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with Largest() as seen:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logits, _ = torch_ops.router_topk(x, w, None, k)
            weights = torch_ops.softmax(logits)
        weights.square().sum().backward()
    return sum(saved.values()), seen.elements


def test_activation_bytes_are_flat_in_experts_and_scores_are_never_whole() -> None:
    tokens, heads, dim, k = 8192, 8, 16, 4
    found = {num: activation_bytes(tokens, heads, dim, num, k) for num in (64, 256, 1024)}
    saved = [s for s, _ in found.values()]
    assert max(saved) <= 1.1 * min(saved)
    # x, k ids, k weights
    assert max(saved) == tokens * heads * (dim * 4 + k * 8 + k * 4)
    assert all(largest <= tokens * heads * dim for _, largest in found.values())


# --- balance ---------------------------------------------------------------------------------
def heads_router(comm: Communicator, **fields: Any) -> HeadsRouter:
    router = lone_layer(MOE.model_copy(update=fields), runtime_of(comm)).parts.layer.router
    assert isinstance(router, HeadsRouter)
    return router


def test_p10_the_bias_step_is_mean_centred_in_each_head() -> None:
    def one(comm: Communicator) -> None:
        router = heads_router(comm, bias_update_rate=0.01)
        state = router.initial_state()
        assert state["bias"].shape == (8, 4)
        loads = np.tile([8, 8, 8, 8], 8)
        loads[4:8] = [16, 8, 4, 4]
        bias = router.update_state(state, {"chosen_E": loads})["bias"]
        np.testing.assert_allclose(bias[1], [-0.0125, -0.0025, 0.0075, 0.0075], atol=1e-15)
        assert not np.delete(bias, 1, 0).any()
        twice = router.update_state({"bias": bias}, {"chosen_E": loads})["bias"]
        np.testing.assert_allclose(twice, 2 * bias)

    alone(one)


def test_a_router_without_balancing_has_no_state() -> None:
    def one(comm: Communicator) -> None:
        router = heads_router(comm)
        assert router.initial_state() == {}
        assert router.update_state({}, {"chosen_E": np.zeros(32)}) == {}

    alone(one)


def test_the_bias_of_a_head_moves_its_choices_alone() -> None:
    x = np.random.default_rng(6).normal(size=(20, WIDTH))

    def one(comm: Communicator) -> None:
        layer = lone_layer(MOE.model_copy(update={"bias_update_rate": 0.01}), runtime_of(comm))
        bias = np.zeros((8, 4))
        bias[2, 3] = 1e6

        def chosen(state: dict[str, np.ndarray]) -> np.ndarray:
            out = layer(variable(x), Tokens(1, 20.0), Memo(state))
            assert out.stats is not None
            return out.stats.chosen_E.value.reshape(8, 4)

        before, after = chosen({}), chosen({"bias": bias})
        assert after[2, 3] == 20
        np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(before, 2, 0))

    alone(one)


def test_balancing_evens_a_lopsided_router() -> None:
    """Signs alone, on fixed tokens: the busiest expert's share falls below 1.5 times the mean."""
    x = np.random.default_rng(7).normal(size=(200, WIDTH)) + 1.0

    def one(comm: Communicator) -> list[float]:
        layer = lone_layer(MOE.model_copy(update={"bias_update_rate": 0.05}), runtime_of(comm))
        state, seen = layer.parts.layer.router.initial_state(), []
        for _ in range(120):
            out = layer(variable(x), Tokens(1, 200.0), Memo(state))
            assert out.stats is not None
            loads = out.stats.chosen_E.value
            seen.append(float((loads.reshape(8, 4).max(1) / 100).max()))
            state = layer.parts.layer.router.update_state(state, {"chosen_E": loads})
        return seen

    seen = alone(one)
    assert seen[0] > 1.8
    assert seen[-1] < 1.5
