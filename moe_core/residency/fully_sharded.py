"""FSEP (LAER-MoE): every rank stores 1/N of every expert and gathers, for one call, the experts of its slots.

Parameters, gradients and optimizer state never move, whatever the layout. Unshard is one equal-split all-to-all of
(slots of all ranks, Psi / N); its adjoint is the reshard: replicas' gradients are summed shard by shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ...backends.protocol import Array, Communicator, Group, Ops, Parameter, Piece
from ..config import MoeConfig
from ..parameters import Init, draw
from ..plan import Plan
from ..transport.base import Exchange
from .feed_forward import expert_rows
from .owned import expert_name, expert_names, expert_shapes


class FullySharded:
    """Stacks (E, ceil(Psi / N)), one per named tensor, zero-padded."""

    def __init__(
        self, ops: Ops, comm: Communicator, group: Group, moe: MoeConfig, width: int, seed: int, std: float
    ) -> None:
        self._ops, self._comm, self._group, self._moe = ops, comm, group, moe
        self._width, self._seed, self._std = width, seed, std
        self._names = expert_names(moe)
        self._shapes = [shape for _, shape, _ in expert_shapes(moe, width, 0.0, 0.0)]
        self._shards = [-(-int(np.prod(shape)) // group.size) for shape in self._shapes]

    def parameters(self, prefix: str, std_down: float) -> tuple[Parameter, ...]:
        num, me = self._moe.num_experts, self._group.index
        made = []
        for (name, shape, std), shard in zip(expert_shapes(self._moe, self._width, self._std, std_down), self._shards):
            pieces = tuple(Piece(expert_name(prefix, e, name), shape, me * shard, (me + 1) * shard) for e in range(num))
            made.append(
                Parameter(
                    name=prefix + name,
                    shape=(num, shard),
                    initial=self._draw(prefix + name, shape, std, shard),
                    reduce_over="expert_data",
                    norm_over="expert",
                    weight_decay=name.startswith("w_"),
                    pieces=pieces,
                )
            )
        return tuple(made)

    def _draw(self, name: str, shape: tuple[int, ...], std: Init, shard: int) -> Callable[[], np.ndarray]:
        def initial() -> np.ndarray:
            start = self._group.index * shard
            out = np.zeros((self._moe.num_experts, shard))
            for e in range(self._moe.num_experts):
                part = draw(self._seed, name, shape, std, expert=e).reshape(-1)[start : start + shard]
                out[e, : len(part)] = part
            return out

        return initial

    def compute(self, params: Mapping[str, Array], rows_ND: Array, exchange: Exchange, plan: Plan | None) -> Array:
        slots = np.arange(self._moe.num_experts)[None] if plan is None else plan.slots
        return expert_rows(self._ops, self._moe, rows_ND, self._unshard(params, slots), exchange.counts_C)

    def _unshard(self, params: Mapping[str, Array], slots_RC: np.ndarray) -> list[Array]:
        """Whole experts of this rank's slots: stacks (C, in, out); an empty slot is zero."""
        ops, ranks, slots = self._ops, self._group.size, slots_RC.shape[1]
        index = ops.asarray(slots_RC.reshape(-1))
        shards = ops.concat([ops.take_rows(params[name], index) for name in self._names], 1)
        arrived = self._comm.all_to_all(shards, self._group).reshape((ranks, slots, sum(self._shards)))
        whole = []
        for part, shape, shard in zip(ops.split(arrived, self._shards, 2), self._shapes, self._shards):
            flat = ops.transpose(part, (1, 0, 2)).reshape((slots, ranks * shard))
            size = int(np.prod(shape))
            kept = ops.split(flat, [size, ranks * shard - size], 1)[0]
            whole.append(kept.reshape((slots, *shape)))
        return whole
