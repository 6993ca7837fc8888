"""What every router shares: its input, its result, the memo that recomputation replays, its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ...backends.protocol import Array, Communicator, DType, Group, Ops, Parameter
from ..config import MoeConfig

State = Mapping[str, np.ndarray]
"""What a router learns without gradients: host arrays by name, the same on every rank."""


@dataclass(frozen=True)
class RouterContext:
    """What a router is built from. layer: index in the model; vocab_size: for hash routers; comm, group: all ranks
    (None: this rank is alone), for what is pooled over them."""

    ops: Ops
    moe: MoeConfig
    width: int
    seed: int = 0
    std: float = 0.02
    layer: int = 0
    vocab_size: int | None = None
    comm: Communicator | None = None
    group: Group | None = None

    def pooled(self, x: Array) -> Array:
        """x summed over all ranks; without gradient."""
        if self.comm is None or self.group is None or self.group.size == 1:
            return x
        return self.ops.stop_gradient(self.comm.all_reduce(self.ops.stop_gradient(x), self.group))

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers: one all-gather and one copy to the host."""
        if self.comm is None or self.group is None or self.group.size == 1:
            return number
        return int(self.comm.gather_to_host(np.array([number]), self.group).max())


@dataclass(frozen=True)
class Tokens:
    """What a layer knows of its T = S x L tokens besides their vectors.

    real_T: boolean, False = padding (None: all real). total: real tokens of the whole optimizer step, over
    ranks and micro-batches. token_ids_T: for hash routing. sequence_positions: place of each sequence in the
    global batch (virtual nodes). domains_S: domain of each sequence. layers: number of MoE layers, the mean over
    which the losses take. over_heads: the tokens of all ranks that share the heads, gathered at the model's entry.
    """

    sequences: int
    total: float
    layers: int = 1
    real_T: Array | None = None
    token_ids_T: Array | None = None
    sequence_positions: np.ndarray | None = None
    global_sequences: int | None = None
    domains_S: np.ndarray | None = None
    step: int = 0
    training: bool = True
    over_heads: Tokens | None = None

    def positions(self) -> np.ndarray:
        """(S,) place of each sequence in the global batch; their own order if nobody said."""
        return np.arange(self.sequences) if self.sequence_positions is None else self.sequence_positions


@dataclass
class Memo:
    """One layer call: the router's state, and decisions kept so that recomputation and backward replay them.

    under_way: weights that set out before the call; ahead: sets out those of the next MoE layer (`prefetch`).
    """

    state: State = field(default_factory=dict)
    decided: dict[str, Any] = field(default_factory=dict)
    under_way: Any = None
    ahead: Callable[[], Any] | None = None

    def once(self, key: str, decide: Callable[[], Any]) -> Any:
        """The value decided at the first call."""
        if key not in self.decided:
            self.decided[key] = decide()
        return self.decided[key]


@dataclass(frozen=True)
class Routing:
    """chosen_TK: the router's choices, -1 where it chose none (padding); ids_TK: those that are computed, -1 =
    dropped; weights_TK: combine weights, accumulate dtype; losses: local contributions, before coefficients.

    statistics: integer arrays whose sums over micro-batches and ranks mean something; nan_T: tokens whose scores
    are not finite (None: not looked for).
    """

    chosen_TK: Array
    ids_TK: Array
    weights_TK: Array
    losses: Mapping[str, Array]
    statistics: Mapping[str, Array] = field(default_factory=dict)
    nan_T: Array | None = None


@dataclass(frozen=True)
class Choice:
    """What a chooser decides, before padding, capacity and losses.

    chosen_TK: ids, best first. weights_TK: combine weights. scores_TK: who wins under capacity (None: the weights).
    shares_TE: probabilities that sum to 1 (None: nothing to balance). logits_TE: for the z-loss. kept_TK: ids after
    the chooser's own capacity (None: the common rule applies). nan_T, unusable_T: see `nan.py`.
    cosine_T: cosine between a token and the gate vector of its first expert (for the capacity bound). best_first:
    experts keep the best whatever `drop_policy` says.
    """

    chosen_TK: Array
    weights_TK: Array
    scores_TK: Array | None = None
    shares_TE: Array | None = None
    logits_TE: Array | None = None
    kept_TK: Array | None = None
    nan_T: Array | None = None
    unusable_T: Array | None = None
    cosine_T: Array | None = None
    best_first: bool = False


class Chooser(Protocol):
    """What differs between routers: parameters, and scores to choices. See docs/routers.md for one's own."""

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        """Parameters named `prefix` + their own name."""
        ...

    def choose(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Choice:
        """Ids and weights. Decisions (ids) go through `memo.once`; nothing else may depend on the call."""
        ...


class Router(Protocol):
    """x -> Routing. State that learns without gradients (biases) is explicit: `Memo.state` in, `update_state` on."""

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        """Parameters named `prefix` + their own name."""
        ...

    def route(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Routing:
        """Choose and weigh experts."""
        ...

    def initial_state(self) -> dict[str, np.ndarray]:
        """State before the first step ({} for most routers)."""
        ...

    def update_state(self, state: State, totals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """State after an optimizer step. totals: the layer's statistics summed over micro-batches and ranks."""
        ...


def flatten_real(ops: Ops, ids_TK: Array, real_T: Array | None) -> Array:
    """Ids with -1 for padding tokens."""
    return ids_TK if real_T is None else ops.where(real_T.reshape((-1, 1)), ids_TK, -1)


def only_real(ops: Ops, x_TE: Array, real_T: Array | None) -> Array:
    """x with the rows of padding tokens set to zero."""
    return x_TE if real_T is None else ops.where(real_T.reshape((-1, 1)), x_TE, 0.0)


def wide_dtype(ops: Ops, router_dtype: DType, *arrays: Array) -> DType:
    """accumulate_dtype: float64 if anything is, else float32."""
    return "float64" if "float64" in (router_dtype, *(ops.dtype_of(a) for a in arrays)) else "float32"


def times(ops: Ops, x: Array, number: float) -> Array:
    """x * number, exact in the dtype of x: MindSpore rounds a Python number to float32 whatever the tensor is."""
    if ops.dtype_of(x) != "float64" or float(np.float32(number)) == number:
        return x * number
    return x * ops.asarray(np.array(number, np.float64))


def constant(ops: Ops, values: np.ndarray, dtype: DType) -> Array:
    """Numbers of the host in that dtype. They are narrowed before they leave it: devices have next to no float64."""
    return ops.cast(ops.asarray(values if dtype == "float64" else values.astype(np.float32)), dtype)
