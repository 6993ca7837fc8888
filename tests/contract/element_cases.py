"""Operators of tensors, shapes, element-wise functions."""

from __future__ import annotations

import numpy as np
from twinmoe.testing.contract.case import Case, given, normal, positive, with_fixed

OPERATORS = [
    Case("add broadcasts a row", lambda ops, a, b: a + b, normal((3, 4), (4,))),
    Case("add a number on either side", lambda ops, a: (1.5 + a) + 2, normal((3, 4))),
    Case("subtract broadcasts a column", lambda ops, a, b: a - b, normal((3, 4), (3, 1))),
    Case("subtract from a number", lambda ops, a: 1.0 - a, normal((3, 4))),
    Case("multiply broadcasts both ways", lambda ops, a, b: a * b, normal((3, 1), (1, 4))),
    Case("multiply by a number", lambda ops, a: 2.0 * a * -0.5, normal((2, 3))),
    Case(
        "divide by a column", lambda ops, a, b: a / b, lambda rng: [rng.normal(size=(3, 4)), rng.uniform(1, 2, (3, 1))]
    ),
    Case("divide a number", lambda ops, a: 1.0 / a, positive((2, 3))),
    Case("divide without rows", lambda ops, a: a / 2.0, normal((0, 3))),
    Case("matmul", lambda ops, a, b: a @ b, normal((3, 4), (4, 2))),
    Case("matmul without rows", lambda ops, a, b: a @ b, normal((0, 4), (4, 2))),
    Case("matmul of stacks", lambda ops, a, b: a @ b, normal((2, 3, 4), (2, 4, 2))),
    Case("reshape", lambda ops, a: a.reshape((2, 6)) * a.reshape((-1, 6)), normal((3, 4))),
    Case("reshape without rows", lambda ops, a: a.reshape((0, 2, 3)), normal((0, 6))),
    Case("sum over the last axis", lambda ops, a: a.sum(-1), normal((3, 4))),
    Case("sum over the first axis", lambda ops, a: a.sum(0), normal((3, 4, 2))),
    Case("sum to a scalar", lambda ops, a: a.sum(0).sum(0), normal((3, 4))),
    Case("mean over the last axis", lambda ops, a: a.mean(-1), normal((3, 4))),
    Case("mean over the first axis", lambda ops, a: a.mean(0), normal((3, 4))),
    Case("integer division and remainder", lambda ops, i: [i // 3, i % 3], given([0, 1, 2, 3, 7, 8])),
    Case("integer arithmetic", lambda ops, i, j: [i + j, i * j, i - 1], given([1, 2, 3], [4, 5, 6])),
    Case("integer sum", lambda ops, i: i.sum(0), given([[1, 2], [3, 4]])),
    Case("comparisons with numbers", lambda ops, i: [i < 2, i <= 2, i > 2, i >= 2, i == 2, i != 2], given([1, 2, 3])),
    Case("comparisons of tensors", lambda ops, i, j: [i < j, i >= j, i == j], given([1, 2, 3], [3, 2, 1])),
    Case("comparison of floats", lambda ops, x: x > 0, normal((3, 4))),
    Case(
        "boolean algebra",
        lambda ops, a, b: [~a, a & b, a | b],
        given([True, True, False, False], [True, False, True, False]),
    ),
]

SHAPES = [
    Case("concat rows", lambda ops, a, b: ops.concat([a, b]), normal((2, 3), (4, 3))),
    Case("concat columns", lambda ops, a, b: ops.concat([a, b], -1), normal((2, 3), (2, 1))),
    Case("concat with an empty part", lambda ops, a, b: ops.concat([a, b, a], 0), normal((2, 3), (0, 3))),
    Case("concat of integers", lambda ops, i: ops.concat([i, i]), given([1, 2])),
    Case("split with zero sizes", lambda ops, a: ops.split(a, [0, 2, 0, 3, 0]), normal((5, 2))),
    Case("split columns", lambda ops, a: ops.split(a, [1, 3], 1), normal((2, 4))),
    Case("split along the last axis", lambda ops, a: ops.split(a, [2, 2], -1), normal((2, 3, 4))),
    Case("split of no rows", lambda ops, a: ops.split(a, [0, 0]), normal((0, 3))),
    Case("use of one piece", lambda ops, a: ops.split(a, [2, 3])[1], normal((5, 2)), exact_zeros=True),
    Case("transpose", lambda ops, a: ops.transpose(a, (2, 0, 1)), normal((2, 3, 4))),
    Case("transpose without rows", lambda ops, a: ops.transpose(a, (1, 0)), normal((0, 4))),
    Case("stop_gradient", lambda ops, a: a * ops.stop_gradient(a), normal((3, 2))),
    Case("stop_gradient of everything", lambda ops, a, b: a + ops.stop_gradient(b), normal((3,), (3,)), True),
    Case("cast there and back", lambda ops, a: ops.cast(ops.cast(a, "float64"), ops.dtype_of(a)), normal((3, 2))),
    Case("cast integers", lambda ops, a, i: a * ops.cast(i, ops.dtype_of(a)), with_fixed([(3,)], [1, 2, 3])),
    Case("cast booleans", lambda ops, a, i: a * ops.cast(i > 1, ops.dtype_of(a)), with_fixed([(3,)], [1, 2, 3])),
]

ELEMENTS = [
    Case("exp", lambda ops, a: ops.exp(a), normal((3, 4))),
    Case("log", lambda ops, a: ops.log(a), positive((3, 4))),
    Case("sqrt", lambda ops, a: ops.sqrt(a), positive((3, 4))),
    Case("sigmoid", lambda ops, a: ops.sigmoid(a), normal((3, 4))),
    Case("sigmoid of large values", lambda ops, a: ops.sigmoid(a), given([-80.0, -20.0, 0.0, 20.0, 80.0])),
    Case("relu", lambda ops, a: ops.relu(a), given([-1.0, 0.0, 2.0]), exact_zeros=True),
    Case("exp without elements", lambda ops, a: ops.exp(a), normal((0, 4))),
    Case(
        "where broadcasts",
        lambda ops, c, a, b: ops.where(c, a, b),
        lambda rng: [np.array([[True], [False], [True]]), rng.normal(size=(3, 4)), rng.normal(size=(4,))],
        exact_zeros=True,
    ),
    Case("where else a number", lambda ops, a: ops.where(a > 0, a, 0.0), normal((3, 4)), exact_zeros=True),
    Case("where then a number", lambda ops, a: ops.where(a > 0, 0.0, a), normal((3, 4)), exact_zeros=True),
    Case("where of integers", lambda ops, i: ops.where(i >= 2, i, -1), given([1, 2, 3])),
    Case(
        "where keeps NaN out of what is not selected",
        lambda ops, a, b: ops.where(a == a, a, b),
        given([1.0, np.nan, 3.0], [4.0, 5.0, 6.0]),
        exact_zeros=True,
    ),
    Case("softmax", lambda ops, a: ops.softmax(a), normal((3, 4))),
    Case("softmax in three dimensions", lambda ops, a: ops.softmax(a), normal((2, 3, 4))),
    Case(
        "softmax of large values", lambda ops, a: ops.softmax(a), given([[1000.0, 999.0, 0.0], [-1000.0, -1000.0, 5.0]])
    ),
    Case("softmax without rows", lambda ops, a: ops.softmax(a), normal((0, 4))),
    Case("logsumexp", lambda ops, a: ops.logsumexp(a), normal((2, 3, 4))),
    Case(
        "logsumexp of large values",
        lambda ops, a: ops.logsumexp(a),
        given([[12.0, 12.0, 0.0, 0.0], [100.0, 0.0, -100.0, 0.0], [-50.0] * 4, [0.0] * 4]),
    ),
    Case("logsumexp with minus infinity", lambda ops, a: ops.logsumexp(a), given([[-np.inf, 1.0, 2.0]])),
    Case("logsumexp without rows", lambda ops, a: ops.logsumexp(a), normal((0, 4))),
]
