"""The comparison itself: what it lets pass and what it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.contract.adapters import Evaluation, adapter_of, assert_same, random_seed, reference

RIGHT = Evaluation([np.array([1.0, 2.0]), np.array([3, 4])], [np.array([0.0, 5.0]), np.zeros(3)])


def changed(value: int | None = None, grad: int | None = None, to: object = None) -> Evaluation:
    values, grads = list(RIGHT.values), list(RIGHT.grads)
    if value is not None:
        values[value] = np.asarray(to)
    if grad is not None:
        grads[grad] = np.asarray(to)
    return Evaluation(values, grads)


@pytest.mark.parametrize(
    "wrong",
    [
        changed(value=0, to=[1.0, 2.0 + 1e-8]),
        changed(value=0, to=[[1.0, 2.0]]),
        changed(value=0, to=[1.0, np.nan]),
        changed(value=1, to=[3, 5]),
        changed(value=1, to=[3.0, 4.0]),
        changed(grad=0, to=[0.0, -5.0]),
        changed(grad=0, to=[1e-12, 5.0]),
        changed(grad=1, to=[0.0, 0.0]),
        changed(grad=1, to=[0.0, 0.0, 1e-9]),
        Evaluation(RIGHT.values[:1], RIGHT.grads),
        Evaluation(RIGHT.values, RIGHT.grads[:1]),
    ],
)
def test_a_difference_is_seen(wrong: Evaluation) -> None:
    assert_same(RIGHT, RIGHT, 1e-10, exact_zeros=True)
    with pytest.raises(AssertionError):
        assert_same(wrong, RIGHT, 1e-10, exact_zeros=True)


@pytest.mark.parametrize("name", ["reference", "cpu", "mindspore-cpu"])
def test_a_planted_fault_in_an_op_is_seen(name: str) -> None:
    backend = load_or_skip(name)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(4, 3)), rng.normal(size=(2, 3, 2)), np.array([1, 3])]

    def right(used: Any, x: Any, w: Any, counts: Any) -> Any:
        return used.grouped_matmul(x, w, counts)

    faults = {
        "sign": lambda used, x, w, counts: used.grouped_matmul(x, w, counts) * -1.0,
        "cut graph": lambda used, x, w, counts: used.grouped_matmul(x, used.stop_gradient(w), counts),
        "shifted groups": lambda used, x, w, counts: used.grouped_matmul(x, w, used.asarray(np.array([2, 2]))),
        "lost rows": lambda used, x, w, counts: used.grouped_matmul(x, w, used.asarray(np.array([1, 2]))),
    }
    expected = reference(right, inputs, random_seed)
    adapter = adapter_of(name)
    assert_same(adapter.evaluate(backend.ops, right, inputs, random_seed), expected, 1e-10)
    for fault in faults.values():
        found = adapter.evaluate(backend.ops, fault, inputs, random_seed)
        with pytest.raises(AssertionError):
            assert_same(found, expected, 1e-10)
