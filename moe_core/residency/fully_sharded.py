"""FSEP (LAER-MoE): every rank stores 1/N of every expert and gathers, for one call, the experts of its slots.

Parameters, gradients and optimizer state never move, whatever the layout. Unshard is one equal-split all-to-all of
(slots of all ranks, Psi / N); its adjoint is the reshard: replicas' gradients are summed shard by shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...backends.protocol import Array, Communicator, Group, Ops, Parameter, Piece
from ..config import MoeConfig
from ..parameters import Init, draw
from ..plan import Plan
from ..transport.base import Exchange
from .feed_forward import expert_rows
from .owned import expert_name, expert_names, expert_shapes


@dataclass(frozen=True)
class Unsharded:
    """slots: of this rank. started: their experts under way; stacks: the experts, here."""

    slots: int
    started: Any
    stacks: list[Array] | None = None


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

    def gather(self, params: Mapping[str, Array], plan: Plan | None) -> Unsharded:
        """One all-to-all of equal splits, under way."""
        return self.gather_slots(params, np.arange(self._moe.num_experts)[None] if plan is None else plan.slots)

    def gather_slots(self, params: Mapping[str, Array], slots_RC: np.ndarray) -> Unsharded:
        """The same for a plan of which only the slots are known yet."""
        index = self._ops.asarray(slots_RC.reshape(-1))
        shards = self._ops.concat([self._ops.take_rows(params[name], index) for name in self._names], 1)
        return Unsharded(slots_RC.shape[1], self._comm.all_to_all_start(shards, self._group))

    def arrived(self, weights: Unsharded) -> Unsharded:
        """With whole experts of this rank's slots: stacks (C, in, out); an empty slot is zero."""
        if weights.stacks is not None:
            return weights
        ops, ranks, slots = self._ops, self._group.size, weights.slots
        arrived = self._comm.all_to_all_finish(weights.started).reshape((ranks, slots, sum(self._shards)))
        whole: list[Array] = []
        for part, shape, shard in zip(ops.split(arrived, self._shards, 2), self._shapes, self._shards):
            flat = ops.transpose(part, (1, 0, 2)).reshape((slots, ranks * shard))
            size = int(np.prod(shape))
            kept = ops.split(flat, [size, ranks * shard - size], 1)[0]
            whole.append(kept.reshape((slots, *shape)))
        return replace(weights, stacks=whole)

    def compute(self, weights: Unsharded, rows_ND: Array, exchange: Exchange, plan: Plan | None) -> Array:
        stacks = self.arrived(weights).stacks
        assert stacks is not None
        return expert_rows(self._ops, self._moe, rows_ND, stacks, exchange.counts_C)
