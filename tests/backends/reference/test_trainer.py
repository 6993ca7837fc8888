"""The reference trainer: optimizers equal torch's, norms count each parameter once, state round-trips."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends.protocol import Component, Launch, Parameter, TrainOptions
from twinmoe.backends.reference import comm, ops, trainer
from twinmoe.backends.reference.tape import Var

A, B = np.array([[1.0, -2.0], [0.5, 3.0]]), np.array([0.25, -1.0])


def parameter(name: str, value: np.ndarray, **spec: Any) -> Parameter:
    return Parameter(name, value.shape, lambda: value.copy(), **spec)


def toy(**spec: Any) -> Component:
    parts = (parameter("a", A), parameter("b", B, weight_decay=False, **spec))
    return Component("toy", parts, lambda p, x: (x @ p["a"] + p["b"]).sum(0))


def built(options: TrainOptions, *components: Component) -> trainer.ReferenceState:
    alone = comm.connect(Launch())
    return trainer.build(components, options, {"world": alone.group("world", [[0]])}, alone)


def loss(state: trainer.ReferenceState, x: np.ndarray) -> tuple[Var, str]:
    y = state.modules["toy"](ops.asarray(x))
    return (y * y).sum(0), "aux"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_equal_those_of_torch(optimizer: Any) -> None:
    torch = pytest.importorskip("torch")
    options = TrainOptions("float64", 0.9, 0.95, 1e-8, weight_decay=0.1, optimizer=optimizer)
    state = built(options, toy())
    a, b = (torch.nn.Parameter(torch.from_numpy(v.copy())) for v in (A, B))
    groups = [
        {"params": [a], "weight_decay": 0.1 if optimizer == "adamw" else 0.0},
        {"params": [b], "weight_decay": 0.0},
    ]
    if optimizer == "adamw":
        theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    else:
        groups[0]["weight_decay"] = 0.1
        theirs = torch.optim.SGD(groups, lr=0.0)
    for step in range(5):
        x = np.random.default_rng(step).normal(size=(3, 2))
        y = (torch.from_numpy(x) @ a + b).sum(0)
        theirs.zero_grad()
        (y * y).sum().backward()
        trainer.accumulate(state, lambda x=x: loss(state, x))
        for group in theirs.param_groups:
            group["lr"] = 0.01 * (step + 1)
        theirs.step()
        trainer.step(state, 0.01 * (step + 1))
        for name, value in (("a", a), ("b", b)):
            np.testing.assert_allclose(state.leaves[name].value, value.detach().numpy(), rtol=1e-13)


def test_accumulation_adds_and_a_step_forgets() -> None:
    state = built(TrainOptions("float64"), toy())
    x = np.ones((1, 2))
    value, aux = trainer.accumulate(state, lambda: loss(state, x))
    once = trainer.gradients(state)
    trainer.accumulate(state, lambda: loss(state, x))
    assert aux == "aux"
    assert not value.needs_grad
    for name, g in trainer.gradients(state).items():
        np.testing.assert_array_equal(g, 2 * once[name])
    trainer.step(state, 0.1)
    assert not any(g.any() for g in trainer.gradients(state).values())


def test_clipping_counts_every_parameter_once_wherever_it_lives() -> None:
    """Dense gradient [1, 2, 2] everywhere; experts [4, 0] and [12, 0], each held by half of the ranks: norm 13."""
    for size in (2, 4):
        experts = {0: [4.0, 0.0], 1: [12.0, 0.0]}

        def fn(c: comm.Communicator, size: int = size, experts: dict[int, list[float]] = experts) -> Any:
            pairs = [[r, r + 1] for r in range(0, size, 2)]
            groups = {"world": c.group("world", [list(range(size))]), "expert": c.group("expert", pairs)}
            parts = (parameter("dense", np.zeros(3)), parameter("expert", np.zeros(2), norm_over="expert"))
            state = trainer.build([Component("c", parts, lambda p: None)], TrainOptions("float64"), groups, c)
            state.grads = {"dense": np.array([1.0, 2, 2]), "expert": np.array(experts[c.rank % 2])}
            return trainer.clip_gradients(state, 6.5), trainer.clip_gradients(state, None), trainer.gradients(state)

        for rank, (norm, after, grads) in enumerate(comm.run_ranks(size, fn)):
            assert (norm, after) == (13.0, 6.5)
            assert grads["dense"].tolist() == [0.5, 1.0, 1.0]
            assert grads["expert"].tolist() == [[2.0, 0.0], [6.0, 0.0]][rank % 2]


def test_reduction_sums_over_each_parameter_s_own_group_in_one_collective() -> None:
    def fn(c: comm.Communicator) -> Any:
        groups = {"world": c.group("world", [[0, 1, 2, 3]]), "expert_data": c.group("expert_data", [[0, 2], [1, 3]])}
        parts = (
            parameter("a", np.zeros((2, 1))),
            parameter("b", np.zeros(())),
            parameter("e", np.zeros(1), reduce_over="expert_data"),
        )
        state = trainer.build([Component("c", parts, lambda p: None)], TrainOptions("float64"), groups, c)
        r = float(c.rank)
        state.grads = {"a": np.array([[r], [1.0]]), "b": np.array(10 * r), "e": np.array([r])}
        trainer.reduce_gradients(state)
        return trainer.gradients(state), c.log

    for rank, (grads, log) in enumerate(comm.run_ranks(4, fn)):
        assert (grads["a"].tolist(), float(grads["b"])) == ([[6.0], [4.0]], 60.0)
        assert grads["e"].tolist() == [[2.0], [4.0]][rank % 2]
        assert [call.group for call in log] == ["expert_data", "world"]


def test_state_round_trips_through_host_tensors() -> None:
    x = np.ones((1, 2))

    def advance(state: trainer.ReferenceState) -> None:
        trainer.accumulate(state, lambda: loss(state, x))
        trainer.step(state, 0.1)

    first, second = built(TrainOptions("float64"), toy()), built(TrainOptions("float64"), toy())
    advance(first)
    advance(first)
    trainer.load_tensors(second, trainer.tensors(first), step=2)
    advance(first)
    advance(second)
    for (n1, k1, v1), (n2, k2, v2) in zip(trainer.tensors(first), trainer.tensors(second), strict=True):
        assert (n1, k1) == (n2, k2)
        np.testing.assert_array_equal(v1, v2)
    with pytest.raises(ValueError, match="not \\(2,\\)"):
        trainer.load_tensors(second, [("b", "parameter", np.zeros(3))], step=0)


def test_components_that_name_the_same_parameter_share_it() -> None:
    other = Component("other", (parameter("a", A),), lambda p: p["a"])
    state = built(TrainOptions("float64"), toy(), other)
    assert state.modules["other"]() is state.leaves["a"]


def test_evaluation_records_nothing_and_leaves_training_as_it_was() -> None:
    state = built(TrainOptions("float64"), toy())
    y = trainer.evaluate(state, lambda: loss(state, np.ones((1, 2)))[0])
    assert not y.needs_grad
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate(state, lambda: 1 // 0)
    assert all(leaf.needs_grad for leaf in state.leaves.values())


def test_sharded_data_parallelism_is_refused() -> None:
    with pytest.raises(ValueError, match="does not shard"):
        built(TrainOptions("float64", data_sharding="full"), toy())


def test_memory_is_the_process_s() -> None:
    assert trainer.peak_memory() > 2**20
    trainer.synchronize()
