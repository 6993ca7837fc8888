"""What every backend's collectives must do: scenarios that each rank of a world of 2 or 4 runs alike."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Group
from twinmoe.testing.contract.adapters import Evaluation
from twinmoe.testing.contract.job import Job, Scenario

UNEVEN = np.array([[0, 2, 0, 1], [0, 0, 0, 0], [3, 0, 0, 0], [0, 0, 0, 4]])
"""Rows from rank (row) to rank (column): rank 1 sends nothing, rank 2 receives nothing, rank 3 sends to itself."""


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


def two_all_to_alls_in_flight(job: Job) -> Evaluation:
    """Both begun before either is ended; work meanwhile; ended in the order of their beginning."""
    send, receive = splits(job)

    def fn(x: Any, z: Any) -> list[Any]:
        first = job.comm.all_to_all_start(x, job.world, send, receive)
        second = job.comm.all_to_all_start(z, job.world)
        square = x * x
        y = job.comm.all_to_all_finish(first)
        back = job.comm.all_to_all_start(y * float(job.rank + 1), job.world, receive, send)
        equal = job.comm.all_to_all_finish(second)
        return [job.comm.all_to_all_finish(back) + square, equal * equal]

    return job.evaluate(fn, numbered_rows(job.rank, sum(send)), job.normal(2 * job.size, 3))


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
        two_all_to_alls_in_flight,
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
        barrier,
    )
}
