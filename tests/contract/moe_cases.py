"""What an MoE layer is made of: selecting experts, moving rows, grouped products, attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from twinmoe.testing.contract.case import Case, Inputs, given, normal, with_fixed

SELECTING = [
    Case("topk", lambda ops, s: ops.topk(s, 3), normal((40, 8))),
    Case("topk of all experts", lambda ops, s: ops.topk(s, 8), normal((10, 8))),
    Case("topk of one", lambda ops, s: ops.topk(s, 1), normal((10, 8))),
    Case("topk without rows", lambda ops, s: ops.topk(s, 2), normal((0, 4))),
    Case("topk breaks ties by id", lambda ops, s: ops.topk(s, 3), lambda rng: [rng.integers(0, 3, (200, 6)) * 1.0]),
    Case("topk of equal scores", lambda ops, s: [ops.topk(s, k) for k in (1, 2, 3, 4)], given([[0.0] * 4, [7.0] * 4])),
    Case("topk at the tie of the last place", lambda ops, s: ops.topk(s, 2), given([[1.0, 5, 1, 1], [0, 2, 2, 2]])),
    Case(
        "topk takes NaN as minus infinity",
        lambda ops, s: ops.topk(s, 2),
        given([[1, 0, 2, -1], [np.nan] * 4, [np.nan, 1, 0, 2], [np.nan, -np.inf, np.nan, -np.inf], [0.0] * 4]),
    ),
    Case("topk of infinities", lambda ops, s: ops.topk(s, 3), given([[-np.inf] * 4, [np.inf, 0, np.inf, -np.inf]])),
    Case("topk of many experts", lambda ops, s: ops.topk(s, 8), lambda rng: [rng.integers(0, 40, (64, 257)) * 1.0]),
    Case("argsort is stable", lambda ops, i: ops.argsort(i), lambda rng: [rng.integers(0, 5, 300)]),
    Case("argsort of large keys", lambda ops, i: ops.argsort(i), given([2**40, 5, 2**40 - 1, 2**40, 0])),
    Case("argsort of nothing", lambda ops, i: ops.argsort(i), lambda rng: [np.zeros(0, np.int64)]),
    Case("invert", lambda ops, i: ops.invert(i), lambda rng: [rng.permutation(50)]),
    Case("invert of nothing", lambda ops, i: ops.invert(i), lambda rng: [np.zeros(0, np.int64)]),
    Case(
        "count leaves out what is out of range",
        lambda ops, i: ops.count(i, 4),
        given([[0, 3, 3], [-1, 4, 9], [1, 3, -5]]),
    ),
    Case("count of nothing", lambda ops, i: ops.count(i, 3), lambda rng: [np.zeros((0, 2), np.int64)]),
    Case("count of ids all outside", lambda ops, i: ops.count(i, 3), given([-1, -1])),
    Case("take_along", lambda ops, x, i: ops.take_along(x, i), with_fixed([(3, 4)], [[0, 3], [2, 1], [3, 0]])),
    Case(
        "take_along repeats", lambda ops, x, i: ops.take_along(x, i), with_fixed([(2, 3)], [[1, 1, 1, 0], [2, 2, 0, 0]])
    ),
    Case(
        "take_along without rows",
        lambda ops, x, i: ops.take_along(x, i),
        lambda rng: [np.zeros((0, 4)), np.zeros((0, 2), int)],
    ),
]

ROWS = [
    Case("take_rows", lambda ops, x, i: ops.take_rows(x, i), with_fixed([(4, 3)], [2, 0, 2, 3, 2]), True),
    Case("take_rows of minus one", lambda ops, x, i: ops.take_rows(x, i), with_fixed([(4, 3)], [-1, 3, -1, 0]), True),
    Case("take_rows of numbers", lambda ops, x, i: ops.take_rows(x, i), with_fixed([(4,)], [3, 3, -1]), True),
    Case("take_rows of matrices", lambda ops, x, i: ops.take_rows(x, i), with_fixed([(3, 2, 2)], [2, -1, 2]), True),
    Case("take_rows of integers", lambda ops, x, i: ops.take_rows(x, i), given([5, 6, 7], [2, -1, 0])),
    Case(
        "take_rows by no index",
        lambda ops, x, i: ops.take_rows(x, i),
        lambda rng: [rng.normal(size=(3, 2)), np.zeros(0, int)],
        True,
    ),
    Case(
        "take_rows of no rows",
        lambda ops, x, i: ops.take_rows(x, i),
        lambda rng: [np.zeros((0, 2)), np.array([-1, -1])],
        True,
    ),
    Case(
        "take_rows keeps NaN of other rows out",
        lambda ops, x, i: ops.take_rows(x, i),
        given([[np.nan, np.nan], [1.0, 2.0]], [1, -1, 1]),
        True,
    ),
    Case("sum_rows", lambda ops, r, i: ops.sum_rows(r, i, 2), given([[1.0], [2.0], [4.0], [8.0]], [1, 0, 1, 0])),
    Case(
        "sum_rows of minus one", lambda ops, r, i: ops.sum_rows(r, i, 4), with_fixed([(5, 2)], [3, -1, 0, 3, -1]), True
    ),
    Case(
        "sum_rows of no rows",
        lambda ops, r, i: ops.sum_rows(r, i, 3),
        lambda rng: [np.zeros((0, 2)), np.zeros(0, int)],
        True,
    ),
    Case("sum_rows into no rows", lambda ops, r, i: ops.sum_rows(r, i, 0), with_fixed([(2, 2)], [-1, -1]), True),
    Case(
        "sum_rows keeps ignored NaN out",
        lambda ops, r, i: ops.sum_rows(r, i, 2),
        given([[np.nan, np.nan], [1.0, 2.0]], [-1, 1]),
        True,
    ),
    Case(
        "combine_rows",
        lambda ops, r, i, w: ops.combine_rows(r, i, w),
        lambda rng: [rng.normal(size=(8, 3)), rng.permutation(8).reshape(4, 2), rng.normal(size=(4, 2))],
    ),
    Case(
        "combine_rows of minus one",
        lambda ops, r, i, w: ops.combine_rows(r, i, w),
        lambda rng: [rng.normal(size=(4, 3)), np.array([[2, -1], [-1, -1], [-1, 0]]), rng.normal(size=(3, 2))],
        exact_zeros=True,
    ),
    Case(
        "combine_rows puts the right weight on the right row",
        lambda ops, r, i, w: ops.combine_rows(r, i, w),
        given([[100.0], [10.0]], [[1, 0]], [[0.7, 0.3]]),
    ),
    Case(
        "combine_rows without rows",
        lambda ops, r, i, w: ops.combine_rows(r, i, w),
        lambda rng: [np.zeros((0, 3)), np.full((2, 2), -1), rng.normal(size=(2, 2))],
        exact_zeros=True,
    ),
    Case(
        "combine_rows without tokens",
        lambda ops, r, i, w: ops.combine_rows(r, i, w),
        lambda rng: [rng.normal(size=(2, 3)), np.zeros((0, 2), int), np.zeros((0, 2))],
        exact_zeros=True,
    ),
    Case(
        "combine_rows keeps NaN of unused rows and weights out",
        lambda ops, r, i, w: ops.combine_rows(r, i, w),
        given([[np.nan], [2.0], [3.0]], [[1, -1], [2, -1]], [[0.5, np.nan], [0.25, np.nan]]),
        exact_zeros=True,
    ),
]


def experts(groups: int, rows: int, activation: str, counts: list[int]) -> Inputs:
    """x (rows, 3), w_up, w_down for F = 2, counts."""
    up = 4 if activation == "swiglu" else 2
    return with_fixed([(rows, 3), (groups, 3, up), (groups, 2, 3)], np.array(counts, np.int64))


def with_trailing_nan(inputs: Inputs, first: int) -> Inputs:
    """The same inputs with NaN in the rows of the first input from `first` on."""

    def make(rng: np.random.Generator) -> list[np.ndarray]:
        made = inputs(rng)
        made[0][first:] = np.nan
        return made

    return make


def grouped(ops: Any, x: Any, w: Any, counts: Any) -> Any:
    return ops.grouped_matmul(x, w, counts)


def swiglu(ops: Any, x: Any, w_up: Any, w_down: Any, counts: Any) -> Any:
    return ops.expert_mlp(x, w_up, w_down, counts, "swiglu")


def turned(ops: Any, x: Any) -> Any:
    half = np.linspace(-3, 3, x.shape[1] * (x.shape[3] // 2)).reshape(1, x.shape[1], 1, -1)
    angle = np.concatenate([half, half], -1)
    wide = np.float32 if ops.dtype_of(x) == "float32" else np.float64
    return ops.rotary(x, *(ops.asarray(turn(angle).astype(wide)) for turn in (np.cos, np.sin)))


def gelu(ops: Any, x: Any, w_up: Any, w_down: Any, counts: Any) -> Any:
    return ops.expert_mlp(x, w_up, w_down, counts, "gelu")


def routers(rows: int, experts: int, scale: float = 1.0) -> Inputs:
    """x (rows, H = 2, D = 3), w (2, 3, experts), bias (2, experts): small integers, so that scores tie."""
    return lambda rng: [
        rng.integers(-2, 3, (rows, 2, 3)) * scale,
        rng.integers(-2, 3, (2, 3, experts)) * 1.0,
        rng.integers(-3, 4, (2, experts)) * 1.0,
    ]


ROUTERS = [
    Case("router_topk", lambda ops, x, w: ops.router_topk(x, w, None, 2), normal((5, 2, 3), (2, 3, 6))),
    Case(
        "router_topk with a bias",
        lambda ops, x, w, b: ops.router_topk(x, w, b, 2),
        normal((5, 2, 3), (2, 3, 6), (2, 6)),
        True,
    ),
    Case("router_topk breaks ties by id", lambda ops, x, w, b: ops.router_topk(x, w, b, 3), routers(40, 9), True),
    Case("router_topk of equal scores", lambda ops, x, w, b: ops.router_topk(x, w, None, 4), routers(3, 9, 0.0)),
    Case("router_topk of all experts", lambda ops, x, w, b: ops.router_topk(x, w, b, 6), routers(7, 6), True),
    Case("router_topk of many experts", lambda ops, x, w, b: ops.router_topk(x, w, b, 8), routers(33, 1100), True),
    Case("router_topk without tokens", lambda ops, x, w, b: ops.router_topk(x, w, b, 2), routers(0, 4), True),
    Case(
        "router_topk replays given ids",
        lambda ops, x, w, i: ops.router_topk(x, w, None, 2, i),
        with_fixed([(2, 2, 3), (2, 3, 4)], [[[3, 0], [1, 1]], [[2, 3], [0, 1]]]),
        exact_zeros=True,
    ),
    Case(
        "router_topk takes NaN as minus infinity",
        lambda ops, x, w, b: ops.router_topk(x, w, b, 3)[1],
        lambda rng: [rng.normal(size=(4, 1, 3)), rng.normal(size=(1, 3, 4)), np.array([[np.nan, 0.0, np.nan, 0.0]])],
    ),
]

COMPUTE = [
    Case("grouped_matmul", grouped, with_fixed([(7, 3), (3, 3, 2)], [4, 1, 2])),
    Case("grouped_matmul with empty groups", grouped, with_fixed([(5, 3), (4, 3, 2)], [0, 3, 0, 2]), True),
    Case("grouped_matmul with trailing rows", grouped, with_fixed([(9, 3), (3, 3, 2)], [0, 4, 2]), True),
    Case(
        "grouped_matmul keeps trailing NaN out",
        grouped,
        with_trailing_nan(with_fixed([(9, 3), (3, 3, 2)], [2, 0, 4]), 6),
        True,
    ),
    Case("grouped_matmul of no rows", grouped, with_fixed([(0, 3), (2, 3, 2)], [0, 0]), True),
    Case("grouped_matmul of trailing rows only", grouped, with_fixed([(3, 3), (2, 3, 2)], [0, 0]), True),
    Case("grouped_matmul of one group", grouped, with_fixed([(4, 3), (1, 3, 2)], [4])),
    Case("expert_mlp swiglu", swiglu, experts(3, 6, "swiglu", [3, 1, 2])),
    Case("expert_mlp gelu", gelu, experts(3, 6, "gelu", [3, 1, 2])),
    Case("expert_mlp swiglu with empty groups and trailing rows", swiglu, experts(4, 7, "swiglu", [0, 3, 0, 2]), True),
    Case("expert_mlp gelu with empty groups and trailing rows", gelu, experts(4, 7, "gelu", [2, 0, 3, 0]), True),
    Case(
        "expert_mlp swiglu keeps trailing NaN out", swiglu, with_trailing_nan(experts(2, 6, "swiglu", [1, 3]), 4), True
    ),
    Case("expert_mlp gelu keeps trailing NaN out", gelu, with_trailing_nan(experts(2, 6, "gelu", [4, 0]), 4), True),
    Case("expert_mlp of no rows", swiglu, experts(2, 0, "swiglu", [0, 0]), True),
    Case("rms_norm", lambda ops, x, w: ops.rms_norm(x, w, 1e-6), normal((3, 4), (4,))),
    Case("rms_norm of heads", lambda ops, x, w: ops.rms_norm(x, w, 1e-5), normal((2, 3, 2, 4), (4,))),
    Case("rms_norm of zeros", lambda ops, x, w: ops.rms_norm(x, w, 1e-6), given([[0.0, 0.0]], [1.0, 2.0])),
    Case("rms_norm without rows", lambda ops, x, w: ops.rms_norm(x, w, 1e-6), normal((0, 4), (4,))),
    Case("rotary", turned, normal((2, 5, 3, 4))),
    Case("rotary of no sequences", turned, normal((0, 5, 3, 4))),
    Case("attention is causal", lambda ops, q, k, v: ops.attention(q, k, v, None), normal(*[(2, 5, 2, 3)] * 3)),
    Case(
        "attention with grouped queries",
        lambda ops, q, k, v: ops.attention(q, k, v, None),
        normal((2, 4, 6, 2), (2, 4, 2, 2), (2, 4, 2, 2)),
    ),
    Case(
        "attention inside documents",
        lambda ops, q, k, v, m: ops.attention(q, k, v, m),
        with_fixed(
            [(1, 4, 2, 2), (1, 4, 1, 2), (1, 4, 1, 2)],
            [
                [
                    [True, False, False, False],
                    [True, True, False, False],
                    [False, False, True, False],
                    [False, False, True, True],
                ]
            ],
        ),
        exact_zeros=False,
    ),
    Case("attention of one token", lambda ops, q, k, v: ops.attention(q, k, v, None), normal(*[(2, 1, 2, 3)] * 3)),
    Case("cross_entropy", lambda ops, z, t: ops.cross_entropy(z, t), with_fixed([(4, 5)], [0, 4, 2, 2])),
    Case(
        "cross_entropy of large logits",
        lambda ops, z, t: ops.cross_entropy(z, t),
        given([[500.0, 0.0], [0.0, 500.0]], [0, 0]),
    ),
    Case(
        "cross_entropy without tokens",
        lambda ops, z, t: ops.cross_entropy(z, t),
        lambda rng: [np.zeros((0, 5)), np.zeros(0, int)],
    ),
]
