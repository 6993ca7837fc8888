"""One rank of the job of test_job.py: python job_worker.py RANK SIZE PORT. Prints one line for each check that held."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from twinmoe.ascend.mindspore import cpu

OPS, TRAINER = cpu.ops, cpu.trainer

import mindspore as ms  # noqa: E402
from twinmoe.ascend.mindspore.comm import MindSporeCommunicator  # noqa: E402
from twinmoe.ascend.mindspore.hccl_comm import HcclWire  # noqa: E402
from twinmoe.backends.protocol import Communicator, Component, Group, Launch, Parameter, TrainOptions  # noqa: E402
from twinmoe.testing.ascend.mindspore.gloo_as_mint import GlooAsMint  # noqa: E402


class Rank:
    """This process, and the same job through both wires."""

    def __init__(self, launch: Launch) -> None:
        self.rank, self.size = launch.rank, launch.size
        self.gloo: Communicator = cpu.comm.connect(launch)
        self.hccl: Communicator = MindSporeCommunicator(launch.rank, launch.size, HcclWire(launch, GlooAsMint()))
        whole = [list(range(self.size))]
        self.worlds = {id(c): c.group("world", whole) for c in (self.gloo, self.hccl)}
        pairs = [[0, 2], [1]]
        self.pairs = {id(c): c.group("pairs", pairs) for c in (self.gloo, self.hccl)}
        assert self.hccl.group("again", whole).handle == self.worlds[id(self.hccl)].handle

    def values(self, *shape: int, dtype: str = "float32") -> Any:
        return OPS.asarray(np.random.default_rng([self.rank, *shape]).normal(size=shape).astype(dtype))

    def alike(
        self, fn: Callable[[Communicator, Group, Any], Any], x: Any, groups: dict[int, Group] | None = None
    ) -> None:
        """Value and gradient of fn through both wires."""
        groups = groups or self.worlds
        found = [self.evaluate(partial(fn, comm, groups[id(comm)]), x) for comm in (self.gloo, self.hccl)]
        for a, b in zip(*found, strict=True):
            np.testing.assert_array_equal(a, b)

    def evaluate(self, fn: Callable[[Any], Any], x: Any) -> tuple[np.ndarray, np.ndarray]:
        """The value of fn(x) and its gradient; a rank without rows takes part in backward all the same."""
        values: list[np.ndarray] = []

        def loss(x: Any) -> Any:
            y = fn(x)
            values.append(OPS.to_numpy(y))
            return (y * y * float(self.rank + 1)).reshape((-1,)).sum(0)

        gradient = OPS.to_numpy(ms.grad(loss)(x))
        return values[0], gradient


def uneven(rank: Rank) -> None:
    """Rank 0 sends to rank 2 alone; rank 1 hears from nobody."""
    sends = np.array([[0, 0, 3], [2, 0, 1], [4, 0, 0]])
    send, recv = sends[rank.rank].tolist(), sends[:, rank.rank].tolist()
    rank.alike(lambda c, g, x: c.all_to_all(x, g, send, recv), rank.values(sum(send), 2))


def equal(rank: Rank) -> None:
    rank.alike(lambda c, g, x: c.all_to_all(x, g), rank.values(6, 2, 2))


def gathers(rank: Rank) -> None:
    rank.alike(lambda c, g, x: c.all_gather(x, g), rank.values(2, 3))
    rank.alike(lambda c, g, x: c.all_gather(x, g), rank.values(2, 3), rank.pairs)


def reductions(rank: Rank) -> None:
    rank.alike(lambda c, g, x: c.reduce_scatter(x, g), rank.values(6, 2))
    rank.alike(lambda c, g, x: c.all_reduce(x, g), rank.values(3))
    rank.alike(lambda c, g, x: c.all_reduce(x, g), rank.values(3), rank.pairs)
    with pytest.raises(ValueError, match="HCCL sums no Float64"):
        rank.hccl.all_reduce(rank.values(2, dtype="float64"), rank.worlds[id(rank.hccl)])


def exchanges(rank: Rank) -> None:
    """Two blocks to the next rank, one to oneself, an empty one; integers beside floats."""
    up, down = (rank.rank + 1) % 3, (rank.rank - 1) % 3
    a, b, own = rank.values(2, 2), rank.values(3), rank.values(1)
    ids, none = OPS.asarray(np.arange(2) + rank.rank), rank.values(0, 4)
    sends = [(up, a), (rank.rank, own), (up, none), (up, b), (up, ids)]
    receives = [(down, a), (down, none), (rank.rank, own), (down, b), (down, ids)]
    found = [[OPS.to_numpy(x) for x in c.exchange(sends, receives, rank.worlds[id(c)])] for c in (rank.gloo, rank.hccl)]
    for x, y in zip(*found, strict=True):
        np.testing.assert_array_equal(x, y)
    assert found[1][4].tolist() == [down, down + 1]
    assert found[1][1].shape == (0, 4)


def hosts(rank: Rank) -> None:
    for comm in (rank.gloo, rank.hccl):
        group = rank.worlds[id(comm)]
        assert comm.gather_to_host(np.array([rank.rank, 7]), group).tolist() == [[0, 7], [1, 7], [2, 7]]
        assert comm.gather_to_host(np.array(0.1 * rank.rank), group).tolist() == [0.0, 0.1, 0.2]
        assert comm.gather_to_host(OPS.asarray(np.array([rank.rank == 1])), group)[:, 0].tolist() == [0, 1, 0]
        assert OPS.to_numpy(comm.broadcast(rank.values(2), 2, group)).shape == (2,)
        flag = comm.broadcast(OPS.asarray(np.array([rank.rank == 1, False])), 1, group)
        assert OPS.to_numpy(flag).tolist() == [True, False]
        comm.barrier()


def refusals(rank: Rank) -> None:
    for comm in (rank.gloo, rank.hccl):
        group = rank.worlds[id(comm)]
        with pytest.raises(ValueError, match="4 rows do not divide over the 3 ranks"):
            comm.all_to_all(rank.values(4, 2), group)
        with pytest.raises(ValueError, match="do not fit 4 rows"):
            comm.all_to_all(rank.values(4, 2), group, [1, 1, 1], [1, 1, 1])
        with pytest.raises(ValueError, match="together, or neither"):
            comm.all_to_all(rank.values(4, 2), group, [4, 0, 0], None)
        with pytest.raises(ValueError, match="do not divide"):
            comm.reduce_scatter(rank.values(4, 2), group)


def sharded(rank: Rank) -> None:
    """Dense parameters cut over all ranks train to the same values as whole ones."""
    rng = np.random.default_rng(5)
    w, b = rng.normal(size=(4, 5)), rng.normal(size=(5,))
    parameters = (
        Parameter("w", (4, 5), lambda: w),
        Parameter("b", (5,), lambda: b, weight_decay=False),
        Parameter("e", (2,), lambda: np.ones(2) * rank.rank, reduce_over="alone", norm_over="world"),
    )
    component = Component("model", parameters, lambda p, x: (x @ p["w"] + p["b"]) * p["e"].sum(0))
    groups = {"world": rank.worlds[id(rank.gloo)], "alone": rank.gloo.group("alone", [[0], [1], [2]])}
    found = []
    for how in ("none", "full"):
        options = TrainOptions(dtype="float64", data_sharding=how)  # type: ignore[arg-type]
        state = TRAINER.build([component], options, groups, rank.gloo)
        assert how == "none" or state.weights["w"].shape == (7,)
        norms, gradients = [], {}
        for _ in range(3):
            x = rank.values(6, 4, dtype="float64")
            for _ in range(2):
                TRAINER.accumulate(state, lambda x=x, s=state: ((s.modules["model"](x) - 1.0).sum(0).sum(0), None))
            TRAINER.reduce_gradients(state)
            gradients = TRAINER.gradients(state)
            norms.append(TRAINER.clip_gradients(state, 1.0))
            TRAINER.step(state, 0.1)
        whole = {f"{name}.{kind}": value for name, kind, value in TRAINER.tensors(state)}
        found.append(whole | {f"{n}.gradient": g for n, g in gradients.items()} | {"norms": np.array(norms)})
        TRAINER.load_tensors(state, [(n, k, v * 2.0) for n, k, v in list(TRAINER.tensors(state))], 3)
        doubled = {f"{name}.{kind}": value for name, kind, value in TRAINER.tensors(state)}
        for name, value in doubled.items():
            np.testing.assert_array_equal(value, whole[name] * 2.0)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-12, atol=1e-14, err_msg=name)


CHECKS = (uneven, equal, gathers, reductions, exchanges, hosts, refusals, sharded)


def main(rank: int, size: int, port: int) -> None:
    me = Rank(Launch(rank=rank, size=size, local_rank=rank, local_size=size, port=port, timeout_s=60))
    for check in CHECKS:
        check(me)
        print(check.__name__, flush=True)
    me.gloo.close()
    os._exit(0)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
