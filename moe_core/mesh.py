"""Which rank is who: the grid data x head x expert x tensor, as plain integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AXES = ("data", "head", "expert", "tensor")


@dataclass(frozen=True)
class Mesh:
    """Ranks in row-major order of (data, head, expert, tensor): tensor ranks are neighbours.

    `data` counts replicas of the experts; every rank outside a tensor group has tokens of its own.
    """

    data: int = 1
    head: int = 1
    expert: int = 1
    tensor: int = 1

    @classmethod
    def over(cls, world_size: int, expert: int = 1, head: int = 1, tensor: int = 1) -> Mesh:
        """The mesh of `world_size` ranks whose data axis takes what is left. ValueError if it does not divide."""
        inner = expert * head * tensor
        if inner < 1 or world_size % inner:
            raise ValueError(
                f"expert_parallel_size x head_parallel_size x tensor_parallel_size = {inner} does not divide "
                f"{world_size} ranks; choose sizes whose product divides the number of ranks"
            )
        return cls(world_size // inner, head, expert, tensor)

    @property
    def size(self) -> int:
        return self.data * self.head * self.expert * self.tensor

    @property
    def token_ranks(self) -> int:
        """Number of ranks with tokens of their own (tensor ranks share theirs)."""
        return self.size // self.tensor

    def coordinate(self, rank: int, axis: str) -> int:
        grid = np.unravel_index(rank, self._shape)
        return int(grid[AXES.index(axis)])

    def partition(self, *axes: str) -> list[list[int]]:
        """Groups of ranks that differ only in the named axes, each in rank order."""
        grid = np.arange(self.size).reshape(self._shape)
        moved = np.moveaxis(grid, [AXES.index(a) for a in axes], range(-len(axes), 0)) if axes else grid[..., None]
        width = int(np.prod([getattr(self, a) for a in axes], dtype=int))
        return [sorted(row) for row in moved.reshape(-1, width).tolist()]

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return (self.data, self.head, self.expert, self.tensor)
