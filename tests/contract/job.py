"""One rank of a job of the contract tests, and how it asks for values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Communicator, Group
from twinmoe.testing.contract.adapters import Adapter, Evaluation


@dataclass(frozen=True)
class Job:
    """One rank of a running job."""

    ops: Any
    trainer: Any
    comm: Communicator
    adapter: Adapter
    world: Group
    dtype: str

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    def evaluate(self, fn: Callable[..., Any], *inputs: np.ndarray) -> Evaluation:
        """Values and gradients of fn(*tensors) under an upstream gradient that differs between ranks."""
        given = [x.astype(self.dtype) if x.dtype.kind == "f" else x for x in inputs]
        return self.adapter.evaluate(self.ops, lambda _, *tensors: fn(*tensors), given, self.seed)

    def seed(self, i: int, value: np.ndarray) -> np.ndarray:
        return np.random.default_rng([self.rank, i, *value.shape]).integers(-8, 9, value.shape) / 4.0

    def normal(self, *shape: int) -> np.ndarray:
        """Values of this rank alone, exact in float32."""
        return np.random.default_rng([self.rank, *shape]).normal(size=shape).astype(np.float32).astype(np.float64)

    def constants(self, *arrays: np.ndarray) -> Evaluation:
        """What has no gradient."""
        return Evaluation([np.asarray(a) for a in arrays], [])

    def host(self, x: Any) -> np.ndarray:
        return self.ops.to_numpy(x)


Scenario = Callable[[Job], Evaluation]
