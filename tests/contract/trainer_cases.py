"""What every backend's trainer must do, on each rank of a world of 2 or 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Component, Parameter, TrainOptions
from twinmoe.testing.contract.adapters import Evaluation
from twinmoe.testing.contract.job import Job, Scenario


def toy_model(job: Job) -> Component:
    """A dense weight on all ranks, an expert of this rank, a master bias without decay, a weight that nobody uses."""
    rng = np.random.default_rng(5)
    dense, bias, unused = rng.normal(size=(3, 2)), rng.normal(size=2), rng.normal(size=4)
    expert = np.random.default_rng([6, job.rank % 2]).normal(size=(1, 2, 2))
    parts = (
        Parameter("dense", dense.shape, dense.copy),
        Parameter("expert", expert.shape, expert.copy, reduce_over="expert_data", norm_over="expert"),
        Parameter("bias", bias.shape, bias.copy, weight_decay=False, master=True),
        Parameter("unused", unused.shape, unused.copy),
    )

    def forward(p: Any, x: Any) -> Any:
        rows = job.ops.sigmoid(x @ p["dense"]) + p["bias"]
        y = job.ops.grouped_matmul(rows, p["expert"], job.ops.asarray(np.array([rows.shape[0]])))
        return (y * y).sum(0).sum(0)

    return Component("toy", parts, forward)


def training(job: Job, optimizer: Any) -> Evaluation:
    """Two steps of two micro-batches: gradients, norms, parameters and optimizer state."""
    pairs = [[r, r + 1] for r in range(0, job.size, 2)]
    columns = [list(range(i, job.size, 2)) for i in range(2)]
    named = {"world": job.world, "expert": job.comm.group("e", pairs), "expert_data": job.comm.group("d", columns)}
    options = TrainOptions(job.dtype, eps=1e-3, weight_decay=0.1, optimizer=optimizer)  # type: ignore[arg-type]
    trainer, state = job.trainer, job.trainer.build([toy_model(job)], options, named, job.comm)
    seen: list[np.ndarray] = []
    for step in range(2):
        for micro in range(2):
            x = np.random.default_rng([job.rank, step, micro]).normal(size=(4, 3)).astype(job.dtype)
            loss, aux = trainer.accumulate(state, lambda x=x: (state.modules["toy"](job.ops.asarray(x)), "aux"))
            assert aux == "aux"
            seen.append(job.host(loss))
        trainer.reduce_gradients(state)
        norms = [trainer.clip_gradients(state, 2.0), trainer.clip_gradients(state, None)]
        seen += [np.array(norms), *by_name(trainer.gradients(state))]
        trainer.step(state, 0.1 / (step + 1))
        seen += by_name({f"{name} {kind}": value for name, kind, value in trainer.tensors(state)})
    seen += by_name(trainer.gradients(state))
    return floats(job, seen)


def training_with_adamw(job: Job) -> Evaluation:
    return training(job, "adamw")


def training_with_sgd(job: Job) -> Evaluation:
    return training(job, "sgd")


def resumed_training(job: Job) -> Evaluation:
    """Three steps equal two steps, a copy through host tensors into a fresh state, and one more."""
    named = {
        "world": job.world,
        "expert": job.world,
        "expert_data": job.comm.group("own", [[r] for r in range(job.size)]),
    }
    options = TrainOptions(job.dtype, eps=1e-3)  # type: ignore[arg-type]
    trainer = job.trainer
    states = [trainer.build([toy_model(job)], options, named, job.comm) for _ in range(2)]

    def advance(state: Any, step: int) -> None:
        x = job.ops.asarray(np.random.default_rng([job.rank, step]).normal(size=(4, 3)).astype(job.dtype))
        trainer.accumulate(state, lambda: (state.modules["toy"](x), None))
        trainer.reduce_gradients(state)
        trainer.step(state, 0.1)

    advance(states[0], 0)
    advance(states[0], 1)
    trainer.load_tensors(states[1], list(trainer.tensors(states[0])), step=2)
    seen: list[np.ndarray] = []
    for state in states:
        advance(state, 2)
        seen += by_name({f"{name} {kind}": value for name, kind, value in trainer.tensors(state)})
    half = len(seen) // 2
    assert all(np.array_equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True)), "resumed otherwise"
    return floats(job, seen)


def rows_of_the_state(job: Job) -> Evaluation:
    """Rows come and go with the optimizer's tensors of the same parameter; the rest stays as it is, bit by bit."""
    trainer, options = job.trainer, TrainOptions(job.dtype, eps=1e-3)  # type: ignore[arg-type]
    named = {"world": job.world, "expert": job.world, "expert_data": job.world}
    state = trainer.build([toy_model(job)], options, named, job.comm)
    x = job.ops.asarray(np.random.default_rng(job.rank).normal(size=(4, 3)).astype(job.dtype))
    trainer.accumulate(state, lambda: (state.modules["toy"](x), None))
    trainer.reduce_gradients(state)
    trainer.step(state, 0.1)
    before = {(name, kind): value.copy() for name, kind, value in trainer.tensors(state)}
    places = [("dense", 0), ("dense", 2), ("expert", 0)]
    rows = trainer.state_rows(state, places)
    kinds = ("parameter", "exp_avg", "exp_avg_sq")
    for (name, row), found in zip(places, rows, strict=True):
        for kind, value in zip(kinds, found, strict=True):
            assert np.array_equal(job.host(value), before[name, kind][row]), (name, kind)
    trainer.write_state_rows(state, places, [rows[1], rows[0], rows[2]])
    after = {(name, kind): value for name, kind, value in trainer.tensors(state)}
    for (name, kind), value in before.items():
        want = value[[2, 1, 0]] if name == "dense" else value
        assert np.array_equal(after[name, kind], want), (name, kind)
    return floats(job, by_name({f"{name} {kind}": value for (name, kind), value in after.items()}))


def evaluation_without_gradients(job: Job) -> Evaluation:
    state = job.trainer.build([toy_model(job)], TrainOptions(job.dtype), {"world": job.world}, job.comm)  # type: ignore[arg-type]
    x = job.ops.asarray(np.ones((2, 3), job.dtype))
    value = job.trainer.evaluate(state, lambda: job.ops.to_numpy(state.modules["toy"](x)))
    return floats(job, [value, *by_name(job.trainer.gradients(state))])


def by_name(arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [arrays[name] for name in sorted(arrays)]


def floats(job: Job, arrays: Sequence[np.ndarray]) -> Evaluation:
    """Compared each against its own norm, in the precision of the job."""
    return Evaluation([np.asarray(a, np.float64) for a in arrays], [])


SCENARIOS: dict[str, Scenario] = {
    fn.__name__: fn
    for fn in (
        training_with_adamw,
        training_with_sgd,
        resumed_training,
        rows_of_the_state,
        evaluation_without_gradients,
    )
}
