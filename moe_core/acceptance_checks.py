"""What `twinmoe acceptance` asks a device, rank by rank: behaviour that no vendor's page settles.

Every check has an exact answer that each rank can work out alone. A check that fails on one rank is told by all; one
that hangs is found in the rank logs, which name each check before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends.protocol import Array, Component, DType, Group, Launch, Parameter, TrainOptions
from ..backends.registry import Backend

WIDTH = 16


@dataclass(frozen=True)
class Place:
    """Where a check runs. dtype: of what it computes."""

    backend: Backend
    comm: Any
    world: Group
    dtype: DType = "float32"


class _SkippedError(Exception):
    """The backend refuses by name what the check would ask."""


def run_rank(backend: Backend, launch: Launch) -> dict[str, Any]:
    """{checks: [{name, status, detail}]}, the same on every rank. status: passed, failed or skipped."""
    comm = backend.comm.connect(launch)
    place = Place(backend, comm, comm.group("world", [list(range(comm.size))]))
    rows = []
    for name, check in CHECKS.items():
        print(f"check {name}", flush=True)
        status, detail = _outcome(check, place)
        statuses = comm.gather_to_host(np.array([_ORDER.index(status)], np.int64), place.world)
        worst = _ORDER[int(statuses.max())]
        told = detail or ("" if worst == "passed" else "see the logs of the other ranks")
        print(f"check {name}: {status} {detail}", flush=True)
        rows.append({"name": name, "status": worst, "detail": told})
    comm.close()
    return {"checks": rows}


_ORDER = ("passed", "skipped", "failed")


def _outcome(check: Callable[[Place], None], place: Place) -> tuple[str, str]:
    try:
        check(place)
    except _SkippedError as error:
        return "skipped", str(error)
    except Exception as error:  # whatever a device says is the answer
        return "failed", f"{type(error).__name__}: {error}".strip()[:2000]
    return "passed", ""


# --- exchanges -----------------------------------------------------------------------------------
def _splits(size: int, kind: str) -> np.ndarray:
    """(source, destination) rows of an exchange."""
    rows = (np.arange(size)[:, None] + np.arange(size)[None, :]) % 3 + 1
    if kind == "every other pair":
        rows[(np.arange(size)[:, None] + np.arange(size)[None, :]) % 2 == 1] = 0
    elif kind == "none from the first":
        rows[0] = 0
    elif kind == "none to the last":
        rows[:, -1] = 0
    elif kind == "none":
        rows[:] = 0
    return rows


def _sent(splits: np.ndarray, source: int) -> np.ndarray:
    """(rows, WIDTH) whole numbers below 256, which every dtype holds, a different run for each pair."""
    total = int(splits[source].sum())
    return ((np.arange(total)[:, None] * 5 + np.arange(WIDTH)[None, :] + 37 * source) % 251).astype(np.float64)


def _expected(splits: np.ndarray, rank: int) -> np.ndarray:
    ends = np.cumsum(splits, axis=1)
    parts = [_sent(splits, s)[ends[s, rank] - splits[s, rank] : ends[s, rank]] for s in range(len(splits))]
    return np.concatenate(parts)


def _exchange(place: Place, kind: str, dtype: str) -> None:
    ops, rank = place.backend.ops, place.world.index
    splits = _splits(place.world.size, kind)
    x = ops.asarray(_sent(splits, rank).astype(np.int64 if dtype == "int64" else np.float32))
    if dtype == "bfloat16":
        x = _cast(place, x, "bfloat16")
    y = place.comm.all_to_all(x, place.world, splits[rank].tolist(), splits[:, rank].tolist())
    _same(ops.to_numpy(y), _expected(splits, rank))


def _exchange_gradient(place: Place, kind: str) -> None:
    """Rows that went to rank d meet the factor d + 1 there; their gradient must be that."""
    ops, rank = place.backend.ops, place.world.index
    splits = _splits(place.world.size, kind)
    total, most = int(splits[rank].sum()), max(1, int(splits.sum(1).max()))

    def forward(p: Mapping[str, Any]) -> Array:
        rows = ops.take_rows(p["w"], ops.asarray(np.arange(total, dtype=np.int64)))
        got = place.comm.all_to_all(rows, place.world, splits[rank].tolist(), splits[:, rank].tolist())
        return got * float(rank + 1)

    found = _gradient(place, forward, np.ones((most, WIDTH)))
    expected = np.zeros((most, WIDTH))
    expected[:total] = np.repeat(np.arange(place.world.size) + 1, splits[rank])[:, None]
    _same(found, expected)


# --- experts -------------------------------------------------------------------------------------
def _grouped(place: Place, counts: tuple[int, ...]) -> None:
    """Product and weight gradient of groups, some without rows, in whole numbers; empty groups give exact zeros."""
    ops, rng = place.backend.ops, np.random.default_rng(0)
    rows, groups = sum(counts), len(counts)
    x = rng.integers(-2, 3, (rows, WIDTH)).astype(np.float32)
    w = rng.integers(-2, 3, (groups, WIDTH, 8)).astype(np.float32)
    counts_G = np.array(counts, np.int64)
    seen: list[np.ndarray] = []

    def forward(p: Mapping[str, Any]) -> Array:
        y = ops.grouped_matmul(ops.asarray(x), p["w"], ops.asarray(counts_G))
        seen.append(ops.to_numpy(y))
        return y

    gradient = _gradient(place, forward, w)
    starts = np.cumsum([0, *counts])
    blocks = [x[starts[g] : starts[g + 1]] for g in range(groups)]
    _same(seen[0], np.concatenate([block @ w[g] for g, block in enumerate(blocks)]))
    _same(gradient, np.stack([np.repeat(block.sum(0)[:, None], 8, 1) for block in blocks]))


def _no_rows(place: Place) -> None:
    """Experts, routing and combination of a rank without a token."""
    ops = place.backend.ops
    empty, none = ops.asarray(np.zeros((0, WIDTH), np.float32)), ops.asarray(np.zeros((0, 2), np.int64))
    w_up, w_down = (ops.asarray(np.ones(shape, np.float32)) for shape in ((2, WIDTH, 16), (2, 8, WIDTH)))
    counts = ops.asarray(np.zeros(2, np.int64))
    y = ops.expert_mlp(empty, w_up, w_down, counts, "swiglu")
    _same(ops.to_numpy(y), np.zeros((0, WIDTH)))
    _same(ops.to_numpy(ops.count(none, 4)), np.zeros(4))
    weights = ops.asarray(np.zeros((0, 2), np.float32))
    _same(ops.to_numpy(ops.combine_rows(y, none, weights)), np.zeros((0, WIDTH)))
    _same(ops.to_numpy(ops.sum_rows(y, ops.asarray(np.zeros(0, np.int64)), 3)), np.zeros((3, WIDTH)))


def _ties(place: Place) -> None:
    """Equal scores go to the lower id, equal keys keep their order."""
    ops, keys = place.backend.ops, np.arange(4096) % 7
    _same(ops.to_numpy(ops.argsort(ops.asarray(keys))), np.argsort(keys, kind="stable"))
    scores = (np.arange(64 * 32).reshape(64, 32) % 3).astype(np.float32)
    _same(ops.to_numpy(ops.topk(ops.asarray(scores), 5)), np.argsort(-scores, axis=1, kind="stable")[:, :5])


def _repeatable(place: Place) -> None:
    """Experts and sums of rows, forward and backward, twice: bitwise the same."""
    ops, rng = place.backend.ops, np.random.default_rng(1)
    x = rng.standard_normal((512, WIDTH)).astype(np.float32)
    index = rng.integers(0, 8, 512)
    counts = np.bincount(index, minlength=8)

    def forward(p: Mapping[str, Any]) -> Array:
        y = ops.grouped_matmul(ops.asarray(x), p["w"], ops.asarray(counts))
        return ops.sum_rows(y, ops.asarray(index), 8)

    w = rng.standard_normal((8, WIDTH, 8))
    first, second = (_gradient(place, forward, w) for _ in range(2))
    assert np.array_equal(first, second), f"two runs differ by {np.abs(first - second).max():.3g}"


# --- shared --------------------------------------------------------------------------------------
def _gradient(place: Place, forward: Callable[[Mapping[str, Any]], Array], w: np.ndarray) -> np.ndarray:
    """Gradient of the sum of forward({w: w}) to w, taken by the backend's trainer."""
    ops, trainer = place.backend.ops, place.backend.trainer
    parameter = Parameter("w", w.shape, lambda: w.astype(np.float32), reduce_over="self", master=True)
    groups = {"self": Group("self", (place.world.ranks[place.world.index],), 0), "world": place.world}
    state = trainer.build(
        [Component("check", (parameter,), lambda p, _: forward(p))], TrainOptions(dtype=place.dtype), groups, place.comm
    )

    def loss_fn() -> tuple[Array, None]:
        y = state.modules["check"](None)
        flat = y.reshape((-1, y.shape[-1]))
        return ops.sum_rows(flat, ops.asarray(np.zeros(flat.shape[0], np.int64)), 1).sum(-1).sum(-1), None

    trainer.accumulate(state, loss_fn)
    return trainer.gradients(state)["w"]


def _cast(place: Place, x: Array, dtype: DType) -> Array:
    try:
        return place.backend.ops.cast(x, dtype)
    except ValueError as error:
        raise _SkippedError(str(error)) from None


def _same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape, f"shape {found.shape}, not {expected.shape}"
    wrong = int((found != expected).sum())
    assert not wrong, f"{wrong} of {expected.size} numbers differ, by up to {np.abs(found - expected).max():.6g}"


_EXCHANGES = ("every pair", "every other pair", "none from the first", "none to the last", "none")
_GROUPS: Mapping[str, tuple[int, ...]] = {
    "empty first": (0, 3, 5),
    "empty middle": (3, 0, 5),
    "empty last": (3, 5, 0),
    "all empty": (0, 0, 0),
    "one expert": (9,),
    "1024 groups": tuple(n % 3 for n in range(1024)),
}
CHECKS: Mapping[str, Callable[[Place], None]] = {
    **{
        f"all_to_all {dtype}, rows: {kind}": lambda p, kind=kind, dtype=dtype: _exchange(p, kind, dtype)
        for dtype in ("float32", "int64", "bfloat16")
        for kind in _EXCHANGES
    },
    **{f"all_to_all gradient, rows: {k}": lambda p, k=k: _exchange_gradient(p, k) for k in _EXCHANGES},
    **{f"grouped matmul, {name}": lambda p, counts=counts: _grouped(p, counts) for name, counts in _GROUPS.items()},
    "no rows": _no_rows,
    "ties": _ties,
    "repeatable": _repeatable,
}
"""In the order in which a new device should be asked."""
