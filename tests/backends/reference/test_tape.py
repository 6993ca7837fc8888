"""The tape: order of adjoints, what it refuses, recomputation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.reference import ops, tape


def test_a_gradient_of_what_nothing_depends_on_is_zero() -> None:
    x, y = tape.variable(np.ones((2, 3))), tape.variable(np.ones(3))
    dx, dy = tape.grad((x * 2.0).sum(0).sum(0), [x, y])
    assert (dx == 2).all()
    assert dy.shape == (3,)
    assert not dy.any()


def test_a_variable_used_twice_sums_its_gradients() -> None:
    x = tape.variable(np.array([3.0]))
    (dx,) = tape.grad(x * x + x, [x])
    assert dx.tolist() == [7.0]


def test_gradients_of_intermediates_and_of_leaves_behind_them_come_together() -> None:
    x = tape.variable(np.array([2.0]))
    y = x * 3.0
    dx, dy = tape.grad(y * y, [x, y])
    assert (dx.tolist(), dy.tolist()) == ([36.0], [12.0])


def test_adjoints_run_in_the_reverse_order_of_creation() -> None:
    ran: list[str] = []

    def noted(name: str) -> Any:
        def raw(value: np.ndarray) -> Any:
            def vjp(g: np.ndarray) -> list[np.ndarray]:
                ran.append(name)
                return [g]

            return value, vjp

        return raw

    x = tape.variable(np.ones(1))
    first, second, third = (tape.apply(noted(n), x) for n in ("first", "second", "third"))
    tape.grad(third + (first * second), [x])
    assert ran == ["third", "second", "first"]


def test_constants_record_nothing() -> None:
    y = ops.exp(ops.asarray(np.ones(2))) * 2.0
    assert y.parents == ()
    assert not y.needs_grad
    assert (ops.asarray(np.ones(2)) > 0).parents == ()


def test_only_the_operators_of_the_contract_exist() -> None:
    x = ops.asarray(np.ones((2, 2)))
    with pytest.raises(TypeError):
        x[0]  # type: ignore[index]
    with pytest.raises(TypeError, match="no truth value"):
        bool(x == x)
    with pytest.raises(TypeError, match="use ops"):
        np.asarray(x)
    with pytest.raises(TypeError, match="for integers"):
        _ = x // 2
    with pytest.raises(TypeError, match="for booleans"):
        _ = x & x
    with pytest.raises(TypeError, match="not numeric"):
        ops.asarray(np.array(["a"]))


def test_a_host_array_on_the_left_does_not_swallow_the_tape() -> None:
    x = tape.variable(np.ones(2))
    y = np.array([2.0, 3.0]) * x
    assert isinstance(y, tape.Var)
    assert tape.grad(y, [x])[0].tolist() == [2.0, 3.0]


def test_matmul_of_vectors_follows_numpy() -> None:
    rng = np.random.default_rng(0)
    a, b, m = (tape.variable(rng.normal(size=s)) for s in ((3,), (3,), (2, 3)))
    for left, right in ((a, b), (m, a), (a, ops.transpose(m, (1, 0)))):
        y = left @ right
        np.testing.assert_allclose(y.value, left.value @ right.value)
        dl, dr = tape.grad(y, [left, right])
        assert dl.shape == left.shape
        assert dr.shape == right.shape


@dataclass(frozen=True)
class Pair:
    y: tape.Var
    aux: dict[str, tape.Var]
    note: str = "kept"


def test_checkpoint_handles_dataclasses_constants_and_what_it_closes_over() -> None:
    rng = np.random.default_rng(0)
    x, w, unused = (tape.variable(rng.normal(size=(2, 2))) for _ in range(3))
    calls: list[int] = []

    def block(a: tape.Var) -> Pair:
        calls.append(1)
        y = ops.sigmoid(a @ w)
        return Pair(y, {"square": (y * y).sum(0), "ids": ops.topk(y, 1)})

    def loss(out: Pair) -> tape.Var:
        return out.y.sum(0).sum(0) + out.aux["square"].sum(0)

    plain = tape.grad(loss(block(x)), [x, w, unused])
    out = ops.checkpoint(block, x)
    assert (len(calls), out.note, out.aux["ids"].needs_grad) == (2, "kept", False)
    again = tape.grad(loss(out), [x, w, unused])
    assert len(calls) == 3
    for a, b in zip(again, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)


def test_checkpoint_inside_checkpoint() -> None:
    x = tape.variable(np.array([0.3, 0.7]))

    def inner(a: tape.Var) -> tape.Var:
        return ops.exp(a) * a

    nested = ops.checkpoint(lambda a: ops.checkpoint(inner, a) * x, x)
    np.testing.assert_allclose(tape.grad(nested, [x])[0], tape.grad(inner(x) * x, [x])[0], rtol=1e-14)


def test_checkpoint_of_constants_is_a_plain_call() -> None:
    y = ops.checkpoint(lambda a: a * 2.0, ops.asarray(np.ones(2)))
    assert not y.needs_grad
