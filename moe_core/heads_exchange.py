"""Which heads a rank has, and how tokens come to them: equal, constant all-to-alls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..backends.protocol import Array, Communicator, Group, Ops
from .routing.base import Tokens

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Heads:
    """`total` heads of width `dim` with `experts` experts each, in equal contiguous shares over the ranks of `group`.

    Inside a rank expert e of its h-th head has the id h * experts + e, so that planners, transports and residencies
    see one layer of count * experts experts.
    """

    total: int
    dim: int
    experts: int
    group: Group

    @property
    def count(self) -> int:
        """Heads of this rank."""
        return self.total // self.group.size

    @property
    def first(self) -> int:
        """The first of them."""
        return self.group.index * self.count


@dataclass(frozen=True)
class HeadExchange:
    """Tokens of this rank, all heads <-> tokens of all ranks, heads of this rank."""

    ops: Ops
    comm: Communicator
    heads: Heads

    def split(self, u_TD: Array) -> Array:
        """(T, N_h d_h) -> (W T count, d_h): sub-tokens ordered by (rank, token, head)."""
        return self.finish_split(self.start_split(u_TD))

    def merge(self, y_ND: Array) -> Array:
        """The inverse: (W T count, d_h) -> (T, N_h d_h)."""
        return self.finish_merge(self.start_merge(y_ND))

    def start_split(self, u_TD: Array) -> Any:
        """Rows leave; `finish_split` has those that arrive."""
        group, tokens = self.heads.group, u_TD.shape[0]
        if group.size == 1:
            return u_TD
        by_rank = self.ops.transpose(u_TD.reshape((tokens, group.size, self._width)), (1, 0, 2))
        return self.comm.all_to_all_start(by_rank.reshape((group.size * tokens, self._width)), group)

    def finish_split(self, started: Any) -> Array:
        """(W T count, d_h)."""
        arrived = started if self.heads.group.size == 1 else self.comm.all_to_all_finish(started)
        return arrived.reshape((arrived.shape[0] * self.heads.count, self.heads.dim))

    def start_merge(self, y_ND: Array) -> Any:
        """Results leave; `finish_merge` has those that arrive."""
        group = self.heads.group
        y_ND = y_ND.reshape((y_ND.shape[0] // self.heads.count, self._width))
        return y_ND if group.size == 1 else self.comm.all_to_all_start(y_ND, group)

    def finish_merge(self, started: Any) -> Array:
        """(T, N_h d_h)."""
        ranks = self.heads.group.size
        if ranks == 1:
            return started
        arrived = self.comm.all_to_all_finish(started)
        tokens = arrived.shape[0] // ranks
        by_token = self.ops.transpose(arrived.reshape((ranks, tokens, self._width)), (1, 0, 2))
        return by_token.reshape((tokens, ranks * self._width))

    @property
    def _width(self) -> int:
        return self.heads.count * self.heads.dim

    def bytes_sent(self, u_TD: Array) -> int:
        """What one of the exchanges sends to other ranks."""
        ranks = self.heads.group.size
        return u_TD.shape[0] * u_TD.shape[1] * BYTES[self.ops.dtype_of(u_TD)] * (ranks - 1) // ranks

    def gather_tokens(self, tokens: Tokens, num_tokens: int) -> Tokens:
        """`tokens` as the heads of this rank see them: those of all ranks of the head group, in rank order.

        One all-gather of the mask, and none where the step has no padding (every rank knows). Every rank must hold
        equally many sequences of equal length.
        """
        ops, group = self.ops, self.heads.group
        if group.size == 1 or tokens.over_heads is not None:
            return tokens.over_heads or tokens
        gathered = replace(
            tokens,
            sequences=tokens.sequences * group.size,
            real_T=None,
            token_ids_T=None,
            sequence_positions=None,
            domains_S=None,
        )
        length = num_tokens // max(tokens.sequences, 1)
        if tokens.total == (tokens.global_sequences or 0) * length:
            return gathered
        flags = ops.asarray(np.ones(num_tokens, np.int64))
        flags = flags if tokens.real_T is None else ops.where(tokens.real_T, flags, 0)
        return replace(gathered, real_T=self.comm.all_gather(flags, group) > 0)
