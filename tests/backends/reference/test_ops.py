"""The reference itself against finite differences and hand-made numbers: it is what the others are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends.reference import ops, tape
from twinmoe.testing.contract.adapters import listed, random_seed, reference
from twinmoe.testing.contract.cases import CASES, Case

NOT_SMOOTH = ("relu", "-inf", "nan", "stop_gradient", "minus infinity", "where of", "where keeps", "of zeros", "topk")
SMOOTH_ROUTERS = ("router_topk", "router_topk with a bias", "router_topk replays given ids")
SMOOTH = [c for c in CASES if c.name in SMOOTH_ROUTERS or not any(word in c.name.lower() for word in NOT_SMOOTH)]


def objective(case: Case, inputs: list[np.ndarray]) -> float:
    total = 0.0
    for i, output in enumerate(listed(case.fn(ops, *(ops.asarray(x) for x in inputs)))):
        value = ops.to_numpy(output)
        if value.dtype.kind == "f":
            total += float((value * random_seed(i, value)).sum())
    return total


@pytest.mark.parametrize("case", SMOOTH, ids=lambda c: c.name.replace(" ", "-"))
def test_gradients_equal_finite_differences(case: Case) -> None:
    inputs = [x.astype(float) if x.dtype.kind == "f" else x for x in case.inputs(np.random.default_rng(7))]
    grads = iter(reference(case.fn, inputs, random_seed).grads)
    step = 1e-5
    for k, x in enumerate(inputs):
        if x.dtype.kind != "f":
            continue
        expected = np.zeros(x.shape)
        for i in np.ndindex(x.shape):
            sides = []
            for sign in (1, -1):
                moved = [v.copy() for v in inputs]
                moved[k][i] += sign * step
                sides.append(objective(case, moved))
            expected[i] = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(next(grads), expected, rtol=1e-6, atol=1e-6)


def test_everything_is_float64_whatever_comes_in() -> None:
    x = ops.asarray(np.ones(2, np.float32))
    assert ops.dtype_of(x) == "float64"
    assert ops.dtype_of(ops.cast(x, "bfloat16")) == "float64"
    assert ops.to_numpy(ops.cast(ops.asarray(np.array([True, False])), "float32")).tolist() == [1.0, 0.0]
    with pytest.raises(TypeError, match="not a floating dtype"):
        ops.dtype_of(ops.asarray(np.array([1])))


def test_logsumexp_of_large_logits_gives_the_right_numbers() -> None:
    z = np.array([[12.0, 12, 0, 0], [100, 0, -100, 0], [-50] * 4, [0] * 4])
    leaf = tape.variable(z)
    y = ops.logsumexp(leaf)
    np.testing.assert_allclose(y.value, [12.6931533248, 100, -48.6137056389, 1.3862943611], rtol=1e-9)
    (d,) = tape.grad((y * y).mean(0), [leaf])
    np.testing.assert_allclose(d[0], [3.1732688340, 3.1732688340, 0.0000194972, 0.0000194972], atol=1e-9)
    np.testing.assert_allclose(d[1], [50, 0, 0, 0], atol=1e-9)


def test_permuted_rows_sum_their_gradients() -> None:
    x = tape.variable(np.zeros((2, 1)))
    (d,) = tape.grad(ops.take_rows(x, ops.asarray(np.array([1, 0, 1, 0]))), [x], np.array([[1.0], [2], [4], [8]]))
    assert d.ravel().tolist() == [10, 5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.topk(ops.asarray(np.zeros((2, 3))), 4), "top 4 of 3"),
        (lambda: ops.split(ops.asarray(np.zeros((2, 3))), [1, 2]), "do not add up"),
        (lambda: grouped(3, [2, 2]), "do not fit 3 rows"),
        (lambda: grouped(3, [1, 1, 1]), "do not fit 3 rows and 2 groups"),
        (lambda: grouped(3, [-1, 2]), "do not fit"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def grouped(rows: int, counts: list[int]) -> Any:
    return ops.grouped_matmul(
        ops.asarray(np.zeros((rows, 2))), ops.asarray(np.zeros((2, 2, 2))), ops.asarray(np.array(counts))
    )
