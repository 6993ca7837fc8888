"""Tokens whose scores are not finite: found, counted, named; raised about or left out, never spread in silence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...backends.protocol import Array, Ops

NAN_TOKENS = "nan_tokens"
"""Statistic (1,): real tokens whose scores were not finite."""


class NonFiniteError(FloatingPointError):
    """A token's router scores are NaN or infinite. The message names rank, layer and position."""


@dataclass(frozen=True)
class Screened:
    """logits_TE to go on with; nan_T: tokens with a score that is not finite; unusable_T: without any that is."""

    logits_TE: Array
    nan_T: Array
    unusable_T: Array | None = None


def screen(ops: Ops, policy: str, logits_TE: Array) -> Screened:
    """raise: only look (a sum over the row is not finite). skip: such scores become minus infinity, and rows without
    any finite score become zeros that nobody uses."""
    seen_TE = ops.stop_gradient(logits_TE)
    if policy == "raise":
        sum_T = seen_TE.sum(-1)
        return Screened(logits_TE, (sum_T - sum_T) != 0)
    bad_TE = (seen_TE - seen_TE) != 0
    number_T = ops.cast(bad_TE, ops.dtype_of(logits_TE)).sum(-1)
    unusable_T = number_T == logits_TE.shape[-1]
    clean_TE = ops.where(unusable_T.reshape((-1, 1)), 0.0, ops.where(bad_TE, -math.inf, logits_TE))
    return Screened(clean_TE, number_T > 0, unusable_T)


def non_finite_rows(ops: Ops, x_TD: Array) -> Array:
    """Boolean (T,): rows with a value that is not finite."""
    mean_T = ops.stop_gradient(x_TD).mean(-1)
    return (mean_T - mean_T) != 0


def count_true(ops: Ops, flag_T: Array, real_T: Array | None) -> Array:
    """(1,) how many real tokens carry the flag."""
    if real_T is not None:
        flag_T = flag_T & real_T
    return ops.count(ops.where(flag_T, ops.asarray(np.zeros(flag_T.shape, np.int64)), -1), 1)


def describe_non_finite(ops: Ops, nan_T: Array, rank: int, layer: int, length: int) -> str | None:
    """'rank 1, layer 3, sequence 0 position 17 (and 4 more)', or None. Copies nan_T to the host: for the rare case."""
    where = np.flatnonzero(ops.to_numpy(nan_T))
    if not len(where):
        return None
    sequence, position = divmod(int(where[0]), max(length, 1))
    more = f" (and {len(where) - 1} more)" if len(where) > 1 else ""
    return f"rank {rank}, layer {layer}, sequence {sequence} position {position}{more}"


class NonFiniteWatch:
    """Names the tokens of a rank that were not finite, micro-batch by micro-batch, until the step is judged."""

    def __init__(self, policy: str, rank: int, layers: Sequence[int], length: int) -> None:
        self._policy, self._rank, self._layers, self._length = policy, rank, layers, length
        self._found: list[str | None] = []

    def add(self, ops: Ops, stats: Sequence[Any]) -> int:
        """Look at the stats of all MoE layers; how many tokens were found (a copy to the host per layer)."""
        number = 0
        for layer, seen in zip(self._layers, stats, strict=True):
            here = int(ops.to_numpy(seen.statistics[NAN_TOKENS])[0]) if NAN_TOKENS in seen.statistics else 0
            if here:
                self._found.append(describe_non_finite(ops, seen.nan_T, self._rank, layer, self._length))
            number += here
        return number

    def judge(self, number: float) -> None:
        """number: tokens found on all ranks. NonFiniteError on every rank under nan_policy raise."""
        if number and self._policy == "raise":
            raise_non_finite(self._found)
        self._found = []


def raise_non_finite(found: Sequence[str | None]) -> None:
    """NonFiniteError that names the tokens found on this rank (or says that another rank has them)."""
    named = [f for f in found if f]
    place = "; ".join(named) if named else "on another rank, see its log"
    raise NonFiniteError(
        f"router scores are not finite: {place}; lower the learning rate, check the data, or set moe.nan_policy=skip"
    )
