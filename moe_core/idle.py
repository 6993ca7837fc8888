"""A rank without tokens: it takes part with one token of padding, which no expert sees and no loss counts.

Kernels and reductions over empty arrays differ between frameworks (an error on one, old memory on another); with a
row of padding every rank runs the same calls, forward and backward.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..backends.protocol import Array, Ops
from .routing.base import Tokens


def with_padding(ops: Ops, x_TD: Array, tokens: Tokens) -> tuple[Array, Tokens]:
    """(x with one row of zeros, tokens that call it padding) for x of no rows."""
    row = ops.cast(ops.asarray(np.zeros((1, x_TD.shape[1]), np.float32)), ops.dtype_of(x_TD))
    padding = replace(
        tokens,
        sequences=1,
        real_T=ops.asarray(np.zeros(1, bool)),
        token_ids_T=None if tokens.token_ids_T is None else ops.asarray(np.zeros(1, np.int64)),
        sequence_positions=None if tokens.sequence_positions is None else np.zeros(1, np.int64),
        domains_S=None if tokens.domains_S is None else np.zeros(1, np.int64),
    )
    return ops.concat([x_TD, row]), padding


def without_padding(ops: Ops, y_TD: Array) -> Array:
    """The rows that the caller gave: none."""
    return ops.split(y_TD, [0, y_TD.shape[0]])[0]
