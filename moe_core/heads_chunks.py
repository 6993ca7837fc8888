"""Head Parallel in two halves: the exchange of one goes on while the other is routed and computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..backends.protocol import Array, Ops
from .heads_exchange import HeadExchange
from .layer import LayerStats, MoELayer, MoEOutput
from .routing.base import Memo, Tokens


def in_chunks(
    exchange: HeadExchange, inner: MoELayer, params: Mapping[str, Array], u_TD: Array, tokens: Tokens, memo: Memo
) -> MoEOutput:
    """Like `inner` between split and merge, on the first half of every rank's sequences, then on the rest.

    tokens: of all ranks, at least two sequences each. y: (T, N_h d_h), merged. Losses are sums of the halves'
    contributions; counts add up; the plan is that of a group of one rank (none).
    """
    ops, ranks = exchange.ops, exchange.heads.group.size
    sequences = tokens.sequences // ranks
    length = u_TD.shape[0] // sequences
    shares = [sequences // 2, sequences - sequences // 2]
    rows = [n * length for n in shares]
    masks = _cut(ops, tokens.real_T, ranks, rows)
    started = [exchange.start_split(u) for u in ops.split(u_TD, rows)]
    outputs, leaving = [], []
    for i, (share, mask, arriving) in enumerate(zip(shares, masks, started, strict=True)):
        half = replace(tokens, sequences=share * ranks, real_T=mask)
        own = memo.once(f"chunk {i}", lambda: Memo(memo.state))
        out = inner(params, exchange.finish_split(arriving), half, own)
        leaving.append(exchange.start_merge(out.y))
        outputs.append(out)
    y_TD = ops.concat([exchange.finish_merge(y) for y in leaving])
    losses = {name: outputs[0].losses[name] + value for name, value in outputs[1].losses.items()}
    return MoEOutput(y_TD, losses, _join(ops, [o.stats for o in outputs if o.stats is not None], ranks))


def _cut(ops: Ops, real_T: Array | None, ranks: int, rows: Sequence[int]) -> list[Array | None]:
    """The mask (W T), ordered by (rank, token), in halves of every rank's tokens."""
    if real_T is None:
        return [None] * len(rows)
    flags = ops.cast(real_T, "float32").reshape((ranks, sum(rows)))
    return [part.reshape((-1,)) > 0 for part in ops.split(flags, rows, 1)]


def _join(ops: Ops, halves: Sequence[LayerStats], ranks: int) -> LayerStats:
    first, second = halves
    chosen_E, kept_E = first.chosen_E + second.chosen_E, first.kept_E + second.kept_E
    statistics = {name: first.statistics[name] + value for name, value in second.statistics.items()}
    nan_T = None
    if first.nan_T is not None and second.nan_T is not None:
        flags = [ops.cast(n, "float32").reshape((ranks, n.shape[0] // ranks)) for n in (first.nan_T, second.nan_T)]
        nan_T = ops.concat(flags, 1).reshape((-1,)) > 0
    return replace(second, chosen_E=chosen_E, kept_E=kept_E, statistics=statistics, nan_T=nan_T)
