"""One thing that every backend's `ops` must do: a function of (ops, *tensors) and its host inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Inputs = Callable[[np.random.Generator], list[np.ndarray]]


@dataclass(frozen=True)
class Case:
    """exact_zeros: where the reference's value or gradient is exactly zero, so must this one's be."""

    name: str
    fn: Callable[..., Any]
    inputs: Inputs
    exact_zeros: bool = False


def normal(*shapes: tuple[int, ...]) -> Inputs:
    return lambda rng: [rng.normal(size=s) for s in shapes]


def given(*values: Any) -> Inputs:
    """Fixed inputs; lists of ints and bools keep their kind."""
    return lambda rng: [np.array(v) for v in values]


def with_fixed(shapes: list[tuple[int, ...]], *values: Any) -> Inputs:
    """Normal floats of these shapes, then fixed inputs."""
    return lambda rng: [*(rng.normal(size=s) for s in shapes), *(np.array(v) for v in values)]


def positive(*shapes: tuple[int, ...]) -> Inputs:
    return lambda rng: [rng.uniform(0.5, 2.0, size=s) for s in shapes]
