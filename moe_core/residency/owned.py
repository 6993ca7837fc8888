"""Weights rest where their expert is computed: plain expert parallelism."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...backends.protocol import Array, Ops, Parameter, Piece
from ..config import MoeConfig
from ..parameters import draw_experts
from ..plan import Plan
from ..transport.base import Exchange


class Owned:
    """A stack (experts of this rank, in, out) per weight; slot c of the rank is row c of the stack."""

    def __init__(self, ops: Ops, moe: MoeConfig, width: int, experts: np.ndarray, seed: int, std: float) -> None:
        self._ops, self._moe, self._width = ops, moe, width
        self._experts, self._seed, self._std = experts, seed, std

    def parameters(self, prefix: str, std_down: float) -> tuple[Parameter, ...]:
        return tuple(
            Parameter(
                name=prefix + name,
                shape=(len(self._experts), *shape),
                initial=draw_experts(self._seed, prefix + name, self._experts.tolist(), shape, std),
                reduce_over="expert_data",
                norm_over="expert",
                pieces=tuple(Piece(expert_name(prefix, int(e), name), shape) for e in self._experts),
            )
            for name, shape, std in expert_shapes(self._moe, self._width, self._std, std_down)
        )

    def compute(self, params: Mapping[str, Array], rows_ND: Array, exchange: Exchange, plan: Plan | None) -> Array:
        """out_ND of this rank's rows."""
        counts = exchange.counts_C
        if counts.shape[0] > len(self._experts):  # a rank with fewer experts than others has an empty last slot
            counts = self._ops.split(counts, [len(self._experts), counts.shape[0] - len(self._experts)])[0]
        return self._ops.expert_mlp(rows_ND, params["w_up"], params["w_down"], counts, self._moe.activation)


def expert_name(prefix: str, expert: int, name: str) -> str:
    """Name of one logical expert's tensor in checkpoints."""
    return f"{prefix}experts.{expert}.{name}"


def expert_shapes(
    moe: MoeConfig, width: int, std: float, std_down: float
) -> tuple[tuple[str, tuple[int, int], float], ...]:
    """(name, shape of one expert, standard deviation of its first values)."""
    hidden = moe.expert_hidden_size
    up = 2 * hidden if moe.activation == "swiglu" else hidden
    return (("w_up", (width, up), std), ("w_down", (hidden, width), std_down))
