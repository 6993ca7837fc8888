"""What every backend's Communicator must do: named scenarios, run alike on each rank of a world of 2 or 4."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Communicator, Component, Group, Parameter, TrainOptions
from twinmoe.testing.contract.adapters import Adapter, Evaluation

DTYPES = ("float64", "float32")
UNEVEN = np.array([[0, 2, 0, 1], [0, 0, 0, 0], [3, 0, 0, 0], [0, 0, 0, 4]])
"""Rows from rank (row) to rank (column): rank 1 sends nothing, rank 2 receives nothing, rank 3 sends to itself."""


@dataclass(frozen=True)
class Job:
    """One rank of a running job."""

    ops: Any
    trainer: Any
    comm: Communicator
    adapter: Adapter
    world: Group
    dtype: str

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    def evaluate(self, fn: Callable[..., Any], *inputs: np.ndarray) -> Evaluation:
        """Values and gradients of fn(*tensors) under an upstream gradient that differs between ranks."""
        given = [x.astype(self.dtype) if x.dtype.kind == "f" else x for x in inputs]
        return self.adapter.evaluate(self.ops, lambda _, *tensors: fn(*tensors), given, self.seed)

    def seed(self, i: int, value: np.ndarray) -> np.ndarray:
        return np.random.default_rng([self.rank, i, *value.shape]).integers(-8, 9, value.shape) / 4.0

    def normal(self, *shape: int) -> np.ndarray:
        """Values of this rank alone, exact in float32."""
        return np.random.default_rng([self.rank, *shape]).normal(size=shape).astype(np.float32).astype(np.float64)

    def constants(self, *arrays: np.ndarray) -> Evaluation:
        """What has no gradient."""
        return Evaluation([np.asarray(a) for a in arrays], [])

    def host(self, x: Any) -> np.ndarray:
        return self.ops.to_numpy(x)


Scenario = Callable[[Job], Evaluation]


def numbered_rows(rank: int, rows: int) -> np.ndarray:
    """Row n of a rank is [100 rank + n, 100 rank + n + 0.5]."""
    first = 100.0 * rank + np.arange(rows)
    return np.stack([first, first + 0.5], 1).reshape(rows, 2)


def splits(job: Job) -> tuple[list[int], list[int]]:
    """Rows that this rank sends to and receives from each."""
    matrix = UNEVEN[: job.size, : job.size]
    return matrix[job.rank].tolist(), matrix[:, job.rank].tolist()


def all_to_all_uneven(job: Job) -> Evaluation:
    send, receive = splits(job)
    return job.evaluate(lambda x: job.comm.all_to_all(x, job.world, send, receive), numbered_rows(job.rank, sum(send)))


def all_to_all_round_trip(job: Job) -> Evaluation:
    send, receive = splits(job)

    def there_and_back(x: Any) -> Any:
        y = job.comm.all_to_all(x, job.world, send, receive) * float(job.rank + 1)
        return job.comm.all_to_all(y, job.world, receive, send)

    return job.evaluate(there_and_back, numbered_rows(job.rank, sum(send)))


def all_to_all_of_numpy_integers(job: Job) -> Evaluation:
    send, receive = (np.array(s, np.int32) for s in splits(job))
    return job.evaluate(
        lambda x: job.comm.all_to_all(x, job.world, send, receive),  # type: ignore[arg-type]
        numbered_rows(job.rank, int(send.sum())),
    )


def all_to_all_of_nothing(job: Job) -> Evaluation:
    zeros = [0] * job.size
    return job.evaluate(lambda x: job.comm.all_to_all(x, job.world, zeros, zeros), np.zeros((0, 3)))


def all_to_all_to_one_rank(job: Job) -> Evaluation:
    send = [0] * (job.size - 1) + [3]
    receive = [3] * job.size if job.rank == job.size - 1 else [0] * job.size
    return job.evaluate(lambda x: job.comm.all_to_all(x, job.world, send, receive), job.normal(3, 2))


def all_to_all_equal(job: Job) -> Evaluation:
    return job.evaluate(lambda x: job.comm.all_to_all(x, job.world), job.normal(2 * job.size, 3))


def all_to_all_of_matrices(job: Job) -> Evaluation:
    send, receive = splits(job)
    return job.evaluate(lambda x: job.comm.all_to_all(x, job.world, send, receive), job.normal(sum(send), 2, 2))


def all_to_all_of_integers(job: Job) -> Evaluation:
    send, receive = splits(job)
    ids = job.ops.asarray(100 * job.rank + np.arange(sum(send)))
    return job.constants(job.host(job.comm.all_to_all(ids, job.world, send, receive)))


def all_to_all_of_bfloat16(job: Job) -> Evaluation:
    send, receive = splits(job)
    rows = job.ops.asarray((numbered_rows(job.rank, sum(send)) % 50).astype(np.float32))
    with contextlib.suppress(ValueError):  # a backend that refuses bfloat16 refuses it on every rank
        rows = job.ops.cast(rows, "bfloat16")
    return job.constants(job.host(job.comm.all_to_all(rows, job.world, send, receive)).astype(np.float64))


def all_gather(job: Job) -> Evaluation:
    return job.evaluate(lambda x: job.comm.all_gather(x, job.world), job.normal(2, 3))


def all_gather_of_integers(job: Job) -> Evaluation:
    return job.constants(job.host(job.comm.all_gather(job.ops.asarray(np.array([job.rank, 7])), job.world)))


def all_gather_of_no_rows(job: Job) -> Evaluation:
    return job.evaluate(lambda x: job.comm.all_gather(x, job.world), np.zeros((0, 3)))


def reduce_scatter(job: Job) -> Evaluation:
    return job.evaluate(lambda x: job.comm.reduce_scatter(x, job.world), job.normal(2 * job.size, 3))


def all_reduce(job: Job) -> Evaluation:
    return job.evaluate(lambda x: job.comm.all_reduce(x, job.world), job.normal(3, 2))


def all_reduce_of_a_scalar(job: Job) -> Evaluation:
    return job.evaluate(lambda x: job.comm.all_reduce(x.sum(0), job.world), job.normal(3))


def all_reduce_of_integers(job: Job) -> Evaluation:
    return job.constants(job.host(job.comm.all_reduce(job.ops.asarray(np.array([job.rank, 2**40])), job.world)))


def all_reduce_keeps_its_input(job: Job) -> Evaluation:
    x = job.ops.asarray(job.normal(3))
    job.comm.all_reduce(x, job.world)
    return job.constants(job.host(x))


def gather_compute_scatter(job: Job) -> Evaluation:
    """Weights gathered for one product and gradients scattered back, twice: adjoints in the reverse order."""

    def fn(x: Any, w: Any) -> Any:
        y = x @ job.comm.all_gather(w, job.world)
        z = job.comm.reduce_scatter(job.ops.transpose(y, (1, 0)), job.world)
        return job.comm.all_reduce(z * z, job.world)

    return job.evaluate(fn, job.normal(3, 2 * job.size), job.normal(2, 2 * job.size))


def rank_without_tokens(job: Job) -> Evaluation:
    """Expert parallelism with all tokens on rank 0 and all experts used on the last rank."""
    send = [0] * (job.size - 1) + [4 if job.rank == 0 else 0]
    receive = [4, *[0] * (job.size - 1)] if job.rank == job.size - 1 else [0] * job.size

    def fn(x: Any, w: Any) -> Any:
        rows = job.comm.all_to_all(x, job.world, send, receive)
        counts = job.ops.asarray(np.array([rows.shape[0]]))
        return job.comm.all_to_all(job.ops.grouped_matmul(rows, w, counts), job.world, receive, send)

    return job.evaluate(fn, job.normal(sum(send), 2), job.normal(1, 2, 2))


def partitions(size: int) -> dict[str, list[list[int]]]:
    if size == 2:
        return {"all": [[0, 1]], "alone": [[0], [1]]}
    return {
        "neighbours": [[0, 1], [2, 3]],
        "strided": [[0, 2], [1, 3]],
        "alone": [[0], [1], [2], [3]],
        "odd": [[1], [0, 2, 3]],
    }


def groups(job: Job) -> Evaluation:
    found: list[Evaluation] = []
    for name, partition in partitions(job.size).items():
        group = job.comm.group(name, partition)
        found.append(job.constants(np.array([group.size, group.index, *group.ranks])))

        def fn(x: Any, group: Group = group) -> list[Any]:
            return [
                job.comm.all_reduce(x, group),
                job.comm.all_gather(x, group),
                job.comm.reduce_scatter(job.comm.all_gather(x, group), group),
                job.comm.all_to_all(job.comm.all_gather(x, group), group),
            ]

        found.append(job.evaluate(fn, job.normal(2, 2)))
    return merged(found)


def exchange(job: Job) -> Evaluation:
    """A ring; two messages of different shapes to the next rank, in order; one to itself; nothing to the others."""
    after, before = (job.rank + 1) % job.size, (job.rank - 1) % job.size
    tensors = [job.ops.asarray(job.normal(2, 3)), job.ops.asarray(job.normal(4)), job.ops.asarray(np.array([job.rank]))]
    received = job.comm.exchange(
        [(after, tensors[0]), (job.rank, tensors[2]), (after, tensors[1])],
        [(before, tensors[0]), (before, tensors[1]), (job.rank, tensors[2])],
        job.world,
    )
    return job.constants(*(job.host(r) for r in received))


def exchange_of_nothing(job: Job) -> Evaluation:
    return job.constants(np.array(len(job.comm.exchange([], [], job.world))))


def exchange_in_one_direction(job: Job) -> Evaluation:
    x = job.ops.asarray(job.normal(3))
    sends = [(job.size - 1, x)] if job.rank == 0 else []
    receives = [(0, x)] if job.rank == job.size - 1 else []
    return job.constants(*(job.host(r) for r in job.comm.exchange(sends, receives, job.world)))


def gather_to_host(job: Job) -> Evaluation:
    counts = np.array([job.rank, 10 + job.rank])
    return job.constants(
        job.comm.gather_to_host(counts, job.world),
        job.comm.gather_to_host(job.ops.asarray(counts), job.world),
        job.comm.gather_to_host(job.ops.asarray(job.normal(2, 2)), job.world),
    )


def broadcast(job: Job) -> Evaluation:
    x = job.ops.asarray(job.normal(2, 2))
    seen = [job.host(job.comm.broadcast(x, root, job.world)) for root in range(job.size)]
    return job.constants(*seen, job.host(x))


def broadcast_in_a_group(job: Job) -> Evaluation:
    """The root is an index in the group, not a rank."""
    group = job.comm.group("halves", [list(range(job.size // 2)), list(range(job.size // 2, job.size))])
    return job.constants(job.host(job.comm.broadcast(job.ops.asarray(np.array([job.rank])), group.size - 1, group)))


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


def barrier(job: Job) -> Evaluation:
    job.comm.barrier()
    return job.constants()


def merged(parts: Sequence[Evaluation]) -> Evaluation:
    return Evaluation([v for p in parts for v in p.values], [g for p in parts for g in p.grads])


SCENARIOS: dict[str, Scenario] = {
    fn.__name__: fn
    for fn in (
        all_to_all_uneven,
        all_to_all_round_trip,
        all_to_all_of_numpy_integers,
        all_to_all_of_nothing,
        all_to_all_to_one_rank,
        all_to_all_equal,
        all_to_all_of_matrices,
        all_to_all_of_integers,
        all_to_all_of_bfloat16,
        all_gather,
        all_gather_of_integers,
        all_gather_of_no_rows,
        reduce_scatter,
        all_reduce,
        all_reduce_of_a_scalar,
        all_reduce_of_integers,
        all_reduce_keeps_its_input,
        gather_compute_scatter,
        rank_without_tokens,
        groups,
        exchange,
        exchange_of_nothing,
        exchange_in_one_direction,
        gather_to_host,
        broadcast,
        broadcast_in_a_group,
        training_with_adamw,
        training_with_sgd,
        resumed_training,
        evaluation_without_gradients,
        barrier,
    )
}


def run_all(backend: Any, comm: Communicator, adapter: Adapter) -> dict[str, Evaluation | str]:
    """Every scenario in both precisions, in one order on all ranks. backend: has `ops` and `trainer`.

    After a failure the ranks are out of step: its text takes the place of its result and of all later ones.
    """
    world = comm.group("world", [list(range(comm.size))])
    results: dict[str, Evaluation | str] = {}
    failure: str | None = None
    for dtype in DTYPES:
        for name, scenario in SCENARIOS.items():
            if failure is None:
                try:
                    results[f"{name}-{dtype}"] = scenario(
                        Job(backend.ops, backend.trainer, comm, adapter, world, dtype)
                    )
                    continue
                except Exception:
                    failure = f"{name}-{dtype} failed:\n{traceback.format_exc()}"
            results[f"{name}-{dtype}"] = failure
    return results
