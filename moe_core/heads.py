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

from ..backends.protocol import Array
from .heads_chunks import in_chunks
from .heads_exchange import HeadExchange
from .idle import with_padding, without_padding
from .layer import LayerStats, MoELayer, MoEOutput
from .routing.base import Memo, Router, Tokens
from .routing.finite import NAN_TOKENS, count_true


@dataclass(frozen=True)
class HeadsLayer:
    """The layer: exchange, then `inner` on this rank's heads, then the exchange back; parameters by short names.

    Ranks that share heads must hold equally many tokens: nobody asks how many (equal shares of a batch, padded).
    """

    exchange: HeadExchange
    inner: MoELayer
    shared: Callable[[Mapping[str, Array], Array], Array] | None = None
    chunks: int = 1

    @property
    def router(self) -> Router:
        """Its state is that of all heads, the same on every rank."""
        return self.inner.router

    def __call__(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> MoEOutput:
        if x_TD.shape[0] == 0:
            out = self(params, *with_padding(self.exchange.ops, x_TD, replace(tokens, over_heads=None)), memo)
            return replace(out, y=without_padding(self.exchange.ops, out.y))
        u_TD = x_TD @ params["w_in"]
        everyone = self.exchange.gather_tokens(tokens, x_TD.shape[0])
        if self.chunks > 1 and tokens.sequences >= self.chunks:
            out = in_chunks(self.exchange, self.inner, params, u_TD, everyone, memo)
            z_TD = out.y
        else:
            out = self.inner(params, self.exchange.split(u_TD), everyone, memo)
            z_TD = self.exchange.merge(out.y)
        y_TD = z_TD @ params["w_out"]
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
