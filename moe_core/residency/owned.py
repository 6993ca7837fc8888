"""Weights rest where their expert is computed: plain expert parallelism."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...backends.protocol import Array, Ops, Parameter, Piece
from ..config import MoeConfig
from ..parameters import Init, draw_experts
from ..plan import Plan
from ..transport.base import Exchange
from .feed_forward import expert_rows


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
                weight_decay=name.startswith("w_"),
                pieces=tuple(Piece(expert_name(prefix, int(e), name), shape) for e in self._experts),
            )
            for name, shape, std in expert_shapes(self._moe, self._width, self._std, std_down)
        )

    def gather(self, params: Mapping[str, Array], plan: Plan | None) -> Mapping[str, Array]:
        """All of them are here."""
        return params

    def arrived(self, weights: Mapping[str, Array]) -> Mapping[str, Array]:
        return weights

    def compute(self, weights: Mapping[str, Array], rows_ND: Array, exchange: Exchange, plan: Plan | None) -> Array:
        """out_ND of this rank's rows."""
        counts = exchange.counts_C
        if counts.shape[0] > len(self._experts):  # a rank with fewer experts than others has an empty last slot
            counts = self._ops.split(counts, [len(self._experts), counts.shape[0] - len(self._experts)])[0]
        stacks = [weights[name] for name in expert_names(self._moe)]
        return expert_rows(self._ops, self._moe, rows_ND, stacks, counts)


def expert_name(prefix: str, expert: int, name: str) -> str:
    """Name of one logical expert's tensor in checkpoints."""
    return f"{prefix}experts.{expert}.{name}"


def expert_shapes(
    moe: MoeConfig, width: int, std: float, std_down: float
) -> tuple[tuple[str, tuple[int, ...], Init], ...]:
    """(name, shape of one expert, standard deviation of its first values)."""
    hidden, up = moe.expert_hidden_size, moe.gates * moe.expert_hidden_size
    weights = (("w_up", (width, up), std), ("w_down", (hidden, width), std_down))
    biases = (("b_up", (up,), "zeros"), ("b_down", (width,), "zeros"))
    return (*weights, *biases) if moe.expert_bias else weights


def expert_names(moe: MoeConfig) -> tuple[str, ...]:
    """Names of an expert's tensors: w_up, w_down, and its biases if it has some."""
    return tuple(name for name, _, _ in expert_shapes(moe, 1, 0.0, 0.0))
