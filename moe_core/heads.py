"""Multi-Head LatentMoE and Head Parallel: many small MoE layers on pieces of each token, shared among ranks by head.

    u_t = x_t W_in, cut into N_h sub-tokens of width d_h
    y_t = concat over heads h of (sum over e in top-k of w_e f_{h,e}(u_{t,h})) W_out

Under Head Parallel rank r of W computes heads [r N_h / W, (r + 1) N_h / W) of everybody's tokens. One all-to-all of
equal, constant splits brings them before anything is routed, its inverse takes the results back: the bytes do not
depend on the number of experts chosen, nor on what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..backends.protocol import Array, Communicator, Group, Ops
from .layer import LayerStats, MoELayer, MoEOutput
from .routing.base import Memo, Router, Tokens
from .routing.finite import NAN_TOKENS, count_true

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
        heads, ranks, tokens = self.heads, self.heads.group.size, u_TD.shape[0]
        width = heads.count * heads.dim
        if ranks > 1:
            by_rank = self.ops.transpose(u_TD.reshape((tokens, ranks, width)), (1, 0, 2))
            u_TD = self.comm.all_to_all(by_rank.reshape((ranks * tokens, width)), heads.group)
        return u_TD.reshape((ranks * tokens * heads.count, heads.dim))

    def merge(self, y_ND: Array) -> Array:
        """The inverse: (W T count, d_h) -> (T, N_h d_h)."""
        heads, ranks = self.heads, self.heads.group.size
        width = heads.count * heads.dim
        tokens = y_ND.shape[0] // (ranks * heads.count)
        y_ND = y_ND.reshape((ranks * tokens, width))
        if ranks > 1:
            arrived = self.comm.all_to_all(y_ND, heads.group).reshape((ranks, tokens, width))
            y_ND = self.ops.transpose(arrived, (1, 0, 2))
        return y_ND.reshape((tokens, ranks * width))

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


@dataclass(frozen=True)
class HeadsLayer:
    """The layer: exchange, then `inner` on this rank's heads, then the exchange back; parameters by short names."""

    exchange: HeadExchange
    inner: MoELayer
    shared: Callable[[Mapping[str, Array], Array], Array] | None = None

    @property
    def router(self) -> Router:
        """Its state is that of all heads, the same on every rank."""
        return self.inner.router

    def __call__(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> MoEOutput:
        u_TD = x_TD @ params["w_in"]
        everyone = self.exchange.gather_tokens(tokens, x_TD.shape[0])
        out = self.inner(params, self.exchange.split(u_TD), everyone, memo)
        y_TD = self.exchange.merge(out.y) @ params["w_out"]
        if self.shared is not None:
            y_TD = y_TD + self.shared(params, x_TD)
        assert out.stats is not None
        return MoEOutput(y_TD, out.losses, self._stats(out.stats, u_TD, tokens))

    def _stats(self, stats: LayerStats, u_TD: Array, tokens: Tokens) -> LayerStats:
        """Counts over the experts of all heads (zero for other ranks' heads); own tokens' non-finite scores."""
        ops, ranks, me = self.exchange.ops, self.exchange.heads.group.size, self.exchange.heads.group.index
        chosen_E, kept_E = self._over_all_heads(stats.chosen_E), stats.kept_E
        kept_E = chosen_E if kept_E is stats.chosen_E else self._over_all_heads(kept_E)
        statistics = {**stats.statistics, "chosen_E": chosen_E, "kept_E": kept_E}
        nan_T = stats.nan_T
        if nan_T is not None:
            nan_T = ops.split(nan_T, [u_TD.shape[0]] * ranks)[me]
            statistics[NAN_TOKENS] = count_true(ops, nan_T, tokens.real_T)
        sent = {"head": 2.0 * self.exchange.bytes_sent(u_TD)} if ranks > 1 else {}
        return replace(stats, chosen_E=chosen_E, kept_E=kept_E, statistics=statistics, nan_T=nan_T, bytes_sent=sent)

    def _over_all_heads(self, counts_E: Array) -> Array:
        heads, ops = self.exchange.heads, self.exchange.ops
        before = heads.first * heads.experts
        after = (heads.total - heads.first - heads.count) * heads.experts
        zeros = [ops.asarray(np.zeros(n, np.int64)) for n in (before, after)]
        return ops.concat([zeros[0], counts_E, zeros[1]])
