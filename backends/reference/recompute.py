"""Activation checkpointing on the tape: forget a sub-graph, run it again in backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import kernels
from .tape import Var, Vjp, apply, backward, captured


def checkpoint(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args) without its intermediates; fn may return Vars inside tuples, lists, dicts and dataclasses.

    Vars that fn closes over get their gradients too.
    """
    mark = Var(0.0)
    result = fn(*_copies(args))
    outputs = _differentiable(result)
    if not outputs:
        return result
    given = [a for a in args if isinstance(a, Var)]
    closed_over = captured(outputs, since=mark.order)
    value = np.concatenate([o.value.reshape(-1) for o in outputs])

    def vjp(g: np.ndarray) -> Sequence[np.ndarray | None]:
        copies = _copies(args)
        again = [o.reshape((-1,)) for o in _differentiable(fn(*copies))]
        inputs = [c for c in copies if isinstance(c, Var)]
        found = backward(apply(kernels.concat, *again, axis=0), g, keep=inputs, stop=closed_over)
        return [found.get(v) for v in (*inputs, *closed_over)]

    def recomputed(*_: np.ndarray) -> tuple[np.ndarray, Vjp]:
        return value, vjp

    return _replace(result, apply(recomputed, *given, *closed_over), [o.shape for o in outputs])


def _copies(args: Sequence[Any]) -> list[Any]:
    return [Var(a.value, a.needs_grad) if isinstance(a, Var) else a for a in args]


def _differentiable(tree: Any) -> list[Var]:
    found: list[Var] = []
    _map(tree, lambda v: found.append(v) if v.needs_grad else None)
    return found


def _replace(tree: Any, flat: Var, shapes: Sequence[tuple[int, ...]]) -> Any:
    """The tree whose differentiable leaves are pieces of `flat`, in order."""
    sizes = [int(np.prod(s, dtype=int)) for s in shapes]
    starts = np.cumsum([0, *sizes]).tolist()
    pieces = iter(
        apply(kernels.piece, flat, start=start, size=size, axis=0).reshape(shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    )
    return _map(tree, lambda v: next(pieces) if v.needs_grad else v)


def _map(tree: Any, fn: Callable[[Var], Any]) -> Any:
    """The same nest of tuples, lists, dicts and dataclasses with fn applied to each Var, in order."""
    if isinstance(tree, Var):
        return fn(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map(t, fn) for t in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map(t, fn) for t in tree)
    if isinstance(tree, dict):
        return {key: _map(t, fn) for key, t in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **{f.name: _map(getattr(tree, f.name), fn) for f in dataclasses.fields(tree)})
    return tree
