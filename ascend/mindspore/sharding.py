"""`data_sharding: full`: a dense parameter stored as one piece per rank, gathered where it is used.

The gather's adjoint is a reduce-scatter, so a rank's gradient arrives summed and cut; with `train.recompute` the
gathered tensor lives as long as its layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from ...backends.protocol import Communicator, Group, Parameter
from .framework import mint


@dataclass(frozen=True)
class Shards:
    """How one parameter is cut: flattened, padded with zeros to a multiple of the group, equal pieces by rank."""

    shape: tuple[int, ...]
    group: Group
    comm: Communicator

    @property
    def elements(self) -> int:
        """Elements of the whole parameter, without padding."""
        return math.prod(self.shape)

    def cut(self, value: np.ndarray) -> np.ndarray:
        """This rank's piece of a whole value."""
        piece = -(-self.elements // self.group.size)
        padded = np.zeros(piece * self.group.size, value.dtype)
        padded[: self.elements] = value.reshape(-1)
        return padded.reshape(self.group.size, piece)[self.group.index]

    def whole(self, piece: Tensor) -> Tensor:
        """The parameter, differentiable. Collective."""
        flat = self.comm.all_gather(piece, self.group)
        return mint.narrow(flat, 0, 0, self.elements).reshape(self.shape)

    def to_host(self, piece: Tensor) -> np.ndarray:
        """The parameter on every rank's host. Collective."""
        return self.comm.gather_to_host(piece, self.group).reshape(-1)[: self.elements].reshape(self.shape)


def shards_of(parameter: Parameter, world: Group, comm: Communicator) -> Shards | None:
    """How a parameter is cut over all ranks; None for those that other groups reduce or that are spread already."""
    dense = parameter.reduce_over == "world" and parameter.norm_over is None
    return Shards(parameter.shape, world, comm) if dense and world.size > 1 else None
