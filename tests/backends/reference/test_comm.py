"""Virtual ranks: failures end everyone at once, calls are counted, idle ranks take part."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.protocol import Launch
from twinmoe.backends.reference import ops, tape
from twinmoe.backends.reference.comm import Call, Communicator, connect, run_ranks


def fails(size: int, fn: Callable[[Communicator], Any], error: type[Exception], message: str) -> None:
    """run_ranks raises `error` with `message`, without waiting for a timeout."""
    started = time.monotonic()
    with pytest.raises(error, match=message):
        run_ranks(size, fn, timeout_s=30)
    assert time.monotonic() - started < 5


def world(comm: Communicator) -> Any:
    return comm.group("world", [list(range(comm.size))])


@pytest.mark.parametrize("size", [2, 8])
def test_a_rank_that_raises_ends_all_with_its_own_exception(size: int) -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == size - 1:
            raise KeyError("the culprit")
        comm.barrier()

    fails(size, fn, KeyError, "the culprit")


def test_a_rank_that_raises_in_backward_ends_all() -> None:
    def fn(comm: Communicator) -> None:
        x = tape.variable(np.ones(2))
        y = comm.all_reduce(x, world(comm))
        if comm.rank == 1:
            raise ZeroDivisionError("no backward here")
        tape.grad(y, [x])

    fails(3, fn, ZeroDivisionError, "no backward here")


def test_a_rank_that_skips_a_collective_is_named() -> None:
    fails(3, lambda comm: comm.barrier() if comm.rank else None, RuntimeError, r"barrier .* for ranks \[0\].* ended")


def test_different_collectives_are_named() -> None:
    def fn(comm: Communicator) -> None:
        group = world(comm)
        x = ops.asarray(np.ones(2))
        comm.all_gather(x, group) if comm.rank else comm.all_reduce(x, group)

    fails(2, fn, RuntimeError, "calls all_.* where another rank calls all_.*same calls in the same order")


def test_a_rank_that_is_late_is_a_timeout() -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank:
            comm.barrier()
        else:
            time.sleep(1.5)

    with pytest.raises(TimeoutError, match=r"(waited 0.5 s in barrier|did not finish within 0.5 s)"):
        run_ranks(2, fn, timeout_s=0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, g, x: c.all_to_all(x, g, [1, 1], [1, 1]), "send splits .* are not 4 rows"),
        (lambda c, g, x: c.all_to_all(x, g, [4, 0], [1, 3]), r"receive splits \[1, 3\], but the other ranks send"),
        (lambda c, g, x: c.all_to_all(x, g, [4], [4]), "1 splits for 2 ranks"),
        (lambda c, g, x: c.all_to_all(ops.asarray(np.ones((3, 1))), g), "3 rows do not split equally"),
        (lambda c, g, x: c.reduce_scatter(ops.asarray(np.ones((3, 1))), g), "not a multiple of 2"),
        (lambda c, g, x: c.all_gather(ops.asarray(np.ones(1 + c.rank)), g), "shapes differ by rank"),
        (lambda c, g, x: c.exchange([(1 - c.rank, x)], [], g), "expects .* from index"),
        (lambda c, g, x: c.group("half", [[0]]), "does not name each of 2 ranks once"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call: Any, message: str) -> None:
    fails(2, lambda comm: call(comm, world(comm), ops.asarray(np.ones((4, 1)))), ValueError, message)


def test_groups_must_be_the_same_everywhere() -> None:
    def fn(comm: Communicator) -> None:
        comm.group("pairs", [[0, 1], [2, 3]] if comm.rank < 2 else [[0, 2], [1, 3]])

    fails(4, fn, RuntimeError, "same calls in the same order")


def test_every_collective_is_logged_with_the_bytes_that_leave_the_rank() -> None:
    def fn(comm: Communicator) -> list[Call]:
        group = world(comm)
        x = tape.variable(np.ones((2, 3)))
        y = comm.all_to_all(x, group, [0, 2] if comm.rank == 0 else [2, 0], [0, 2] if comm.rank == 0 else [2, 0])
        tape.grad(comm.all_gather(y, group), [x])
        comm.gather_to_host(np.arange(4), group)
        return comm.log

    for log in run_ranks(2, fn):
        assert log == [
            ("all_to_all", "world", 48),
            ("all_gather", "world", 48),
            ("reduce_scatter", "world", 48),
            ("all_to_all", "world", 48),
            ("gather_to_host", "world", 32),
        ]


def test_a_rank_with_nothing_to_send_issues_the_same_collectives() -> None:
    """All tokens go to the expert of rank 0: the expert of rank 1 gets real zeros."""
    rows = {0: np.array([[1.0, 2], [3, -1]]), 1: np.array([[0.5, 0.5], [-2, 4]])}
    weight = 0.7310585786

    def fn(comm: Communicator) -> Any:
        group = world(comm)
        x, a = (
            tape.variable(rows[comm.rank]),
            tape.variable(np.array([[[2.0, 0], [0, 2]], [[-3, 0], [0, -3]]])[[comm.rank]]),
        )
        here = [2, 2] if comm.rank == 0 else [0, 0]
        arrived = comm.all_to_all(x, group, [2, 0], here)
        out = ops.grouped_matmul(arrived, a, ops.asarray(np.array([arrived.shape[0]])))
        y = comm.all_to_all(out, group, here, [2, 0]) * weight
        dx, da = tape.grad(y, [x, a])
        return y.value, dx, da, [name for name, _, _ in comm.log]

    first, second = run_ranks(2, fn)
    for (y, dx, _, log), x in ((first, rows[0]), (second, rows[1])):
        np.testing.assert_allclose(y, 1.4621171573 * x, rtol=1e-9)
        np.testing.assert_allclose(dx, np.full((2, 2), 1.4621171573), rtol=1e-9)
        assert log == ["all_to_all"] * 4
    np.testing.assert_allclose(np.trace(first[2][0]), 2.5 * weight + 5.5 * weight, rtol=1e-12)
    assert second[2].shape == (1, 2, 2)
    assert not second[2].any()


def test_sums_have_the_same_bits_on_every_rank_and_run() -> None:
    def fn(comm: Communicator) -> bytes:
        x = ops.asarray(np.random.default_rng(comm.rank).normal(size=100))
        return comm.all_reduce(x, world(comm)).value.tobytes()

    assert len({*run_ranks(8, fn), *run_ranks(8, fn)}) == 1


def test_what_a_rank_sent_may_change_afterwards() -> None:
    def fn(comm: Communicator) -> np.ndarray:
        group = world(comm)
        mine = np.full(2, float(comm.rank))
        gathered = comm.gather_to_host(mine, group)
        mine[:] = -1
        comm.barrier()
        return gathered

    for gathered in run_ranks(2, fn):
        assert gathered.tolist() == [[0, 0], [1, 1]]


def test_connect_finds_the_rank_of_its_thread_and_is_alone_elsewhere() -> None:
    alone = connect(Launch())
    assert (alone.rank, alone.size) == (0, 1)
    assert run_ranks(3, lambda comm: connect(Launch(comm.rank, 3)) is comm) == [True] * 3
    with pytest.raises(ValueError, match="start virtual ranks with"):
        connect(Launch(0, 2))


def test_a_closed_rank_is_waited_for_by_nobody() -> None:
    def fn(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.close()
            time.sleep(0.3)
        else:
            comm.barrier()

    fails(2, fn, RuntimeError, r"for ranks \[0\], which have ended")
