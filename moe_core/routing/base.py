"""What every router shares: its input, its result, the memo that recomputation replays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ...backends.protocol import Array, Ops, Parameter


@dataclass(frozen=True)
class Tokens:
    """What a layer knows of its T = S x L tokens besides their vectors.

    real_T: boolean, False = padding (None: all real). total: real tokens of the whole optimizer step, over
    ranks and micro-batches. token_ids_T: for hash routing. sequence_positions: place of each sequence in the
    global batch (virtual nodes). layers: number of MoE layers, the mean over which the losses take.
    """

    sequences: int
    total: float
    layers: int = 1
    real_T: Array | None = None
    token_ids_T: Array | None = None
    sequence_positions: np.ndarray | None = None
    global_sequences: int | None = None
    step: int = 0
    training: bool = True


@dataclass
class Memo:
    """Decisions of one layer call, kept so that recomputation and backward replay them."""

    decided: dict[str, Any] = field(default_factory=dict)

    def once(self, key: str, decide: Callable[[], Any]) -> Any:
        """The value decided at the first call."""
        if key not in self.decided:
            self.decided[key] = decide()
        return self.decided[key]


@dataclass(frozen=True)
class Routing:
    """chosen_TK: the router's choices, -1 where it chose none (padding); ids_TK: those that are computed, -1 =
    dropped; weights_TK: combine weights, accumulate dtype; losses: local contributions, before coefficients."""

    chosen_TK: Array
    ids_TK: Array
    weights_TK: Array
    losses: Mapping[str, Array]


class Router(Protocol):
    """x -> Routing. State that learns without gradients (biases) is an explicit array, updated by the loop."""

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        """Parameters named `prefix` + their own name."""
        ...

    def route(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Routing:
        """Choose and weigh experts."""
        ...


def flatten_real(ops: Ops, ids_TK: Array, real_T: Array | None) -> Array:
    """Ids with -1 for padding tokens."""
    return ids_TK if real_T is None else ops.where(real_T.reshape((-1, 1)), ids_TK, -1)
