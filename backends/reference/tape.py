"""A reverse-mode tape over NumPy float64: the reference's arrays and how they are differentiated.

A `Var` remembers its parents and a vector-Jacobian product. Gradients are taken in the reverse of the order in
which Vars were made, so ranks that issue the same collectives forward issue the same ones backward.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Vjp = Callable[[np.ndarray], Sequence["np.ndarray | None"]]
"""Gradient of the result -> gradient of each input (None where an input has none)."""

Raw = Callable[..., tuple[np.ndarray, Vjp]]
"""A function of arrays that returns (value, vjp)."""

_creation = itertools.count()


class Var:
    """An array of the reference: float64, int64 or bool, with what the contract allows a tensor to do.

    Only the operators of `backends/protocol.py` exist here, so that core code which needs more fails first
    on the reference.
    """

    __array_ufunc__ = None
    __slots__ = ("needs_grad", "order", "parents", "value", "vjp")

    def __init__(self, value: Any, needs_grad: bool = False) -> None:
        self.value = _canonical(value)
        self.needs_grad = needs_grad and self.value.dtype.kind == "f"
        self.parents: tuple[Var, ...] = ()
        self.vjp: Vjp | None = None
        self.order = next(_creation)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def reshape(self, shape: Sequence[int]) -> Var:
        return apply(_reshape, self, shape=tuple(shape))

    def sum(self, axis: int) -> Var:
        return apply(_sum, self, axis=axis)

    def mean(self, axis: int) -> Var:
        return self.sum(axis) / self.shape[axis]

    def __add__(self, other: Any) -> Var:
        return apply(_add, self, other)

    def __sub__(self, other: Any) -> Var:
        return apply(_subtract, self, other)

    def __mul__(self, other: Any) -> Var:
        return apply(_multiply, self, other)

    def __truediv__(self, other: Any) -> Var:
        return apply(_divide, self, other)

    def __matmul__(self, other: Any) -> Var:
        return apply(_matmul, self, other)

    def __radd__(self, other: Any) -> Var:
        return apply(_add, other, self)

    def __rsub__(self, other: Any) -> Var:
        return apply(_subtract, other, self)

    def __rmul__(self, other: Any) -> Var:
        return apply(_multiply, other, self)

    def __rtruediv__(self, other: Any) -> Var:
        return apply(_divide, other, self)

    def __rmatmul__(self, other: Any) -> Var:
        return apply(_matmul, other, self)

    def __neg__(self) -> Var:
        return apply(_subtract, 0, self)

    def __floordiv__(self, other: Any) -> Var:
        return Var(_integers(self) // _integers(other))

    def __mod__(self, other: Any) -> Var:
        return Var(_integers(self) % _integers(other))

    def __invert__(self) -> Var:
        return Var(~_booleans(self))

    def __and__(self, other: Any) -> Var:
        return Var(_booleans(self) & _booleans(other))

    def __or__(self, other: Any) -> Var:
        return Var(_booleans(self) | _booleans(other))

    def __lt__(self, other: Any) -> Var:
        return Var(self.value < lift(other).value)

    def __le__(self, other: Any) -> Var:
        return Var(self.value <= lift(other).value)

    def __gt__(self, other: Any) -> Var:
        return Var(self.value > lift(other).value)

    def __ge__(self, other: Any) -> Var:
        return Var(self.value >= lift(other).value)

    def __eq__(self, other: Any) -> Var:  # type: ignore[override]
        return Var(self.value == lift(other).value)

    def __ne__(self, other: Any) -> Var:  # type: ignore[override]
        return Var(self.value != lift(other).value)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError("a tensor has no truth value in core code; use ops.where, or ops.to_numpy on the host")

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("a tensor is not a host array; use ops.to_numpy")

    def __repr__(self) -> str:
        return f"Var({self.value!r}, needs_grad={self.needs_grad})"


def variable(value: Any) -> Var:
    """A leaf with respect to which gradients can be taken."""
    return Var(np.array(value, np.float64), needs_grad=True)


def lift(x: Any) -> Var:
    """x itself when it is a Var, else a constant."""
    return x if isinstance(x, Var) else Var(x)


def apply(raw: Raw, *inputs: Any, **static: Any) -> Var:
    """raw(*values, **static) as a node of the tape."""
    parents = tuple(lift(i) for i in inputs)
    value, vjp = raw(*(p.value for p in parents), **static)
    out = Var(value)
    if out.value.dtype.kind == "f" and any(p.needs_grad for p in parents):
        out.needs_grad, out.parents, out.vjp = True, parents, vjp
    return out


def grad(output: Var, wrt: Sequence[Var], seed: np.ndarray | None = None) -> list[np.ndarray]:
    """Gradients of sum(output * seed) (seed of ones by default), zeros where nothing depends."""
    found = backward(output, np.ones(output.shape) if seed is None else seed, keep=wrt)
    return [found.get(w, np.zeros(w.shape)) for w in wrt]


def backward(output: Var, seed: np.ndarray, keep: Iterable[Var], stop: Iterable[Var] = ()) -> dict[Var, np.ndarray]:
    """Gradients of the Vars in `keep` and `stop`; what lies behind those in `stop` is not visited."""
    stop = frozenset(stop)
    keep = frozenset(keep) | stop
    grads = {output: np.broadcast_to(np.asarray(seed, np.float64), output.shape)} if output.needs_grad else {}
    heap = [(-v.order, v) for v in grads]
    kept: dict[Var, np.ndarray] = {}
    while heap:
        var = heapq.heappop(heap)[1]
        upstream = grads.pop(var)
        if var in keep:
            kept[var] = upstream
        if var.vjp is None or var in stop:
            continue
        for parent, g in zip(var.parents, var.vjp(upstream), strict=True):
            if not parent.needs_grad or g is None:
                continue
            if parent in grads:
                grads[parent] = grads[parent] + g
            else:
                grads[parent] = g
                heapq.heappush(heap, (-parent.order, parent))
    return kept


def captured(outputs: Iterable[Var], since: int) -> list[Var]:
    """Vars made before `since` that the outputs depend on, oldest first: the edge of a sub-graph."""
    seen: set[Var] = set()
    edge: list[Var] = []
    stack = [v for v in outputs if v.needs_grad]
    while stack:
        var = stack.pop()
        if var in seen:
            continue
        seen.add(var)
        if var.order < since:
            edge.append(var)
        else:
            stack.extend(p for p in var.parents if p.needs_grad)
    return sorted(edge, key=lambda v: v.order)


def unbroadcast(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum g over the axes along which `shape` was broadcast."""
    g = g.sum(tuple(range(g.ndim - len(shape))))
    return g.sum(tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1), keepdims=True)


def _canonical(value: Any) -> np.ndarray:
    value = np.asarray(value)
    kind = value.dtype.kind
    if kind not in "biuf":
        raise TypeError(f"an array of {value.dtype} is not numeric; pass floats, integers or booleans")
    return value if kind == "b" else value.astype(np.float64 if kind == "f" else np.int64, copy=False)


def _integers(x: Any) -> np.ndarray:
    value = lift(x).value
    if value.dtype.kind != "i":
        raise TypeError(f"// and % are for integers, not {value.dtype}")
    return value


def _booleans(x: Any) -> np.ndarray:
    value = lift(x).value
    if value.dtype.kind != "b":
        raise TypeError(f"~ & | are for booleans, not {value.dtype}")
    return value


def _add(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, Vjp]:
    return a + b, lambda g: (unbroadcast(g, a.shape), unbroadcast(g, b.shape))


def _subtract(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, Vjp]:
    return a - b, lambda g: (unbroadcast(g, a.shape), unbroadcast(-g, b.shape))


def _multiply(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, Vjp]:
    return a * b, lambda g: (unbroadcast(g * b, a.shape), unbroadcast(g * a, b.shape))


def _divide(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, Vjp]:
    return a / b, lambda g: (unbroadcast(g / b, a.shape), unbroadcast(-g * a / (b * b), b.shape))


def _matmul(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, Vjp]:
    a2 = a[None, :] if a.ndim == 1 else a
    b2 = b[:, None] if b.ndim == 1 else b
    y2 = a2 @ b2

    def vjp(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        g2 = g.reshape(y2.shape)
        da = unbroadcast(g2 @ b2.swapaxes(-1, -2), a2.shape)
        db = unbroadcast(a2.swapaxes(-1, -2) @ g2, b2.shape)
        return da.reshape(a.shape), db.reshape(b.shape)

    y = y2[..., 0, :] if a.ndim == 1 else y2
    return (y[..., 0] if b.ndim == 1 else y), vjp


def _reshape(x: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, Vjp]:
    return x.reshape(shape), lambda g: (g.reshape(x.shape),)


def _sum(x: np.ndarray, axis: int) -> tuple[np.ndarray, Vjp]:
    return x.sum(axis), lambda g: (np.broadcast_to(np.expand_dims(g, axis), x.shape),)
