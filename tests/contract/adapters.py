"""How each framework is asked for values and gradients: the only framework-specific code of the contract tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from twinmoe.backends.reference import ops as reference_ops
from twinmoe.backends.reference import tape

Function = Callable[..., Any]
"""fn(ops, *tensors) -> one tensor or a list of them."""

TOLERANCES = {"float64": 1e-10, "float32": 1e-5}


@dataclass(frozen=True)
class Evaluation:
    """Host values of every output, and gradients of sum(output * seed) with respect to the floating inputs."""

    values: list[np.ndarray]
    grads: list[np.ndarray]


class Adapter(Protocol):
    """One framework."""

    def evaluate(
        self, ops: Any, fn: Function, inputs: Sequence[np.ndarray], seed: Callable[[int, np.ndarray], np.ndarray]
    ) -> Evaluation:
        """seed(i, value) is the upstream gradient of output i; integer outputs get none."""
        ...


def adapter_of(backend_name: str) -> Adapter:
    if backend_name == "reference":
        return TapeAdapter()
    return MindSporeAdapter() if backend_name in ("ascend", "mindspore-cpu") else TorchAdapter()


class TapeAdapter:
    def evaluate(
        self, ops: Any, fn: Function, inputs: Sequence[np.ndarray], seed: Callable[[int, np.ndarray], np.ndarray]
    ) -> Evaluation:
        leaves = [tape.variable(x) if x.dtype.kind == "f" else ops.asarray(x) for x in inputs]
        outputs = listed(fn(ops, *leaves))
        values = [ops.to_numpy(o) for o in outputs]
        wanted = [leaf for leaf in leaves if leaf.value.dtype.kind == "f"]
        grads = [np.zeros(leaf.shape) for leaf in wanted]
        for i, (output, value) in enumerate(zip(outputs, values, strict=True)):
            if value.dtype.kind == "f":
                found = tape.grad(output, wanted, seed(i, value))
                grads = [g + f for g, f in zip(grads, found, strict=True)]
        return Evaluation(values, grads)


class TorchAdapter:
    def evaluate(
        self, ops: Any, fn: Function, inputs: Sequence[np.ndarray], seed: Callable[[int, np.ndarray], np.ndarray]
    ) -> Evaluation:
        import torch

        tensors = [ops.asarray(x) for x in inputs]
        leaves = [t.requires_grad_() for t in tensors if t.is_floating_point()]
        outputs = listed(fn(ops, *tensors))
        values = [ops.to_numpy(o) for o in outputs]
        seeded = [
            (o, ops.asarray(seed(i, v).astype(v.dtype)))
            for i, (o, v) in enumerate(zip(outputs, values, strict=True))
            if o.requires_grad
        ]
        if not seeded:
            return Evaluation(values, [np.zeros(x.shape) for x in leaves])
        heads, upstream = zip(*seeded, strict=True)
        grads = torch.autograd.grad(heads, leaves, upstream, allow_unused=True)
        return Evaluation(
            values,
            [np.zeros(x.shape) if g is None else ops.to_numpy(g) for x, g in zip(leaves, grads, strict=True)],
        )


class MindSporeAdapter:
    def evaluate(
        self, ops: Any, fn: Function, inputs: Sequence[np.ndarray], seed: Callable[[int, np.ndarray], np.ndarray]
    ) -> Evaluation:
        import mindspore as ms

        tensors = [ops.asarray(x) for x in inputs]
        floating = [i for i, x in enumerate(inputs) if x.dtype.kind == "f"]
        values: list[np.ndarray] = []

        def objective(*leaves: Any) -> Any:
            given = dict(zip(floating, leaves, strict=True))
            outputs = listed(fn(ops, *(given.get(i, t) for i, t in enumerate(tensors))))
            values[:] = [ops.to_numpy(o) for o in outputs]
            total = ops.asarray(np.zeros((), inputs[floating[0]].dtype))
            for i, (o, v) in enumerate(zip(outputs, values, strict=True)):
                if v.dtype.kind == "f":
                    total = total + (o * ops.asarray(seed(i, v).astype(v.dtype))).reshape((-1,)).sum(0)
            return total

        if not floating:
            return Evaluation([ops.to_numpy(o) for o in listed(fn(ops, *tensors))], [])
        # MindSpore returns nothing for tuples of inputs, and a bare tensor for one position
        positions: Any = tuple(range(len(floating)))
        grads = ms.grad(objective, positions)(*(tensors[i] for i in floating))
        grads = grads if isinstance(grads, tuple) else (grads,)
        return Evaluation(values, [ops.to_numpy(g) for g in grads])


def listed(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def reference(fn: Function, inputs: Sequence[np.ndarray], seed: Any) -> Evaluation:
    """The right values."""
    return TapeAdapter().evaluate(reference_ops, fn, inputs, seed)


def random_seed(i: int, value: np.ndarray) -> np.ndarray:
    """An upstream gradient that depends on the output's number and shape only (exact in float32)."""
    drawn = np.random.default_rng([i, *value.shape]).integers(-8, 9, value.shape)
    return drawn / 4.0


def assert_same(found: Evaluation, right: Evaluation, tolerance: float, exact_zeros: bool = False) -> None:
    """Integers exactly; floats in norm relative to max(||right||, 1e-3 x the largest gradient of the case)."""
    assert len(found.values) == len(right.values)
    assert len(found.grads) == len(right.grads)
    largest = max((float(np.linalg.norm(v)) for v in right.values if v.dtype.kind == "f"), default=0.0)
    for i, (a, b) in enumerate(zip(found.values, right.values, strict=True)):
        assert a.dtype.kind == b.dtype.kind, f"output {i} is {a.dtype}, not {b.dtype}"
        check(f"output {i}", a, b, tolerance if b.dtype.kind == "f" else 0.0, 1e-3 * largest, exact_zeros)
    largest = max((float(np.linalg.norm(g)) for g in right.grads), default=0.0)
    for i, (a, b) in enumerate(zip(found.grads, right.grads, strict=True)):
        check(f"gradient {i}", a, b, tolerance, 1e-3 * largest, exact_zeros)


def check(what: str, a: np.ndarray, b: np.ndarray, tolerance: float, floor: float, exact_zeros: bool) -> None:
    assert a.shape == b.shape, f"{what} has shape {a.shape}, not {b.shape}"
    if tolerance == 0.0:
        np.testing.assert_array_equal(a, b, err_msg=what)
        return
    assert np.isfinite(a).all() or not np.isfinite(b).all(), f"{what} is not finite"
    error = float(np.linalg.norm(np.asarray(a, np.float64) - b)) / max(float(np.linalg.norm(b)), floor, 1e-300)
    assert error <= tolerance, f"{what} is off by {error:.2e} (tolerance {tolerance:.0e})"
    if exact_zeros:
        assert not a[b == 0].any(), f"{what} is not exactly zero where it must be"
