"""Expert choices of a stated skew for benchmarks, and a router that makes exactly these.

balanced        K distinct experts, each alike
hot:P:H         P percent of the copies on the first H experts (of one rank where H <= E / ranks), the rest alike
zipf:S          the n-th expert in a fixed order is drawn as 1 / n^S
groups:G:M      K experts inside M of G equal groups of each token (DeepSeek's node limit)
together:M      M experts that lie E / M apart are chosen together, the rest alike (what a swap can bring together)
counts:FILE     as often as a JSON list of E numbers says
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..backends.protocol import Array, Ops, Parameter
from .combinations import ConfigError
from .parameters import draw_dense
from .routing.base import Memo, Routing, State, Tokens

GRAMMAR = "balanced, hot:PERCENT:EXPERTS, zipf:S, groups:GROUPS:CHOSEN, together:M or counts:FILE"


MOST_SCORES = 2**28
"""Tokens x experts of a rank: 2 GiB an array."""


@dataclass(frozen=True)
class Skew:
    """A parsed description. repeat_ids: copies of a token are drawn independently (some published generators)."""

    kind: str
    numbers: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    repeat_ids: bool = False
    text: str = field(default="balanced")

    @classmethod
    def parse(cls, text: str, repeat_ids: bool = False) -> Skew:
        """ConfigError where the text is none of the forms above."""
        kind, *rest = text.split(":")
        label = f"{text} (repeated ids)" if repeat_ids else text
        if kind == "counts" and rest:
            return cls(kind, (), _read_counts(Path(":".join(rest))), repeat_ids, label)
        wanted = {"balanced": 0, "hot": 2, "zipf": 1, "groups": 2, "together": 1}.get(kind)
        try:
            numbers = tuple(float(part) for part in rest)
        except ValueError:
            numbers = ()
        finite = all(map(math.isfinite, numbers))
        if wanted is None or len(numbers) != wanted or len(rest) != wanted or not finite:
            raise ConfigError(f"the skew {text!r} is unknown; choose {GRAMMAR}")
        return cls(kind, numbers, (), repeat_ids, label)

    def check(self, num_experts: int, top_k: int) -> None:
        """ConfigError where tokens of K distinct experts can't have this skew."""
        if not self.repeat_ids and top_k > num_experts:
            raise ConfigError(
                f"a token can't choose {top_k} distinct experts of {num_experts}; lower top_k or add --repeat-ids"
            )
        if self.kind in ("groups", "together") and any(n != int(n) for n in self.numbers):
            raise ConfigError(f"{self.text}: {self.kind} takes whole numbers")
        if self.repeat_ids and self.kind in ("groups", "together"):
            raise ConfigError(f"{self.kind} is about distinct experts; leave --repeat-ids out")
        if self.kind == "together":
            members = int(self.numbers[0])
            if not 1 <= members <= top_k or num_experts % members:
                raise ConfigError(f"{self.text}: choose a number that divides {num_experts} experts, at most {top_k}")
        if self.kind == "hot":
            percent, hot = self.numbers
            copies = top_k * percent / 100
            if not 0 <= percent <= 100 or not 0 < hot <= num_experts:
                raise ConfigError(f"{self.text}: {hot:g} of {num_experts} experts and {percent:g} percent do not exist")
            if not self.repeat_ids and (hot < copies or num_experts - hot < top_k - copies):
                raise ConfigError(
                    f"{self.text} with {top_k} distinct experts a token needs between {int(np.ceil(copies))} and "
                    f"{num_experts - int(np.ceil(top_k - copies))} hot experts; change it or add --repeat-ids"
                )
        if self.kind == "groups":
            groups, chosen = int(self.numbers[0]), int(self.numbers[1])
            if groups < 1 or num_experts % groups or not 1 <= chosen <= groups:
                raise ConfigError(f"{self.text}: {num_experts} experts do not make such groups; choose divisors")
            if chosen * num_experts // groups < top_k:
                raise ConfigError(f"{self.text} leaves fewer than {top_k} experts; choose more groups")
        if self.kind == "counts" and len(self.weights) != num_experts:
            raise ConfigError(f"{self.text} holds {len(self.weights)} numbers, the layer has {num_experts} experts")


def check_size(tokens: int, num_experts: int) -> None:
    """ConfigError for more choices of a rank than are drawn at once in a host's memory."""
    if tokens * num_experts > MOST_SCORES:
        raise ConfigError(
            f"{tokens} tokens of {num_experts} experts are drawn at once and do not fit; "
            f"choose at most {MOST_SCORES // num_experts} tokens"
        )


def _read_counts(path: Path) -> tuple[float, ...]:
    try:
        values = np.asarray(json.loads(path.read_text(encoding="utf-8")), float)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as a JSON list of counts ({error})") from None
    flat = values.sum(0) if values.ndim == 2 else values
    if flat.ndim != 1 or not np.isfinite(flat).all() or (flat < 0).any() or flat.sum() <= 0:
        raise ConfigError(f"{path} must hold one list of numbers, none negative, not all zero")
    return tuple(flat.tolist())


def choose(skew: Skew, num_experts: int, tokens: int, top_k: int, seed: int) -> np.ndarray:
    """Ids (T, K) int64 of one rank; distinct in a token unless the skew repeats ids. ConfigError if impossible."""
    skew.check(num_experts, top_k)
    rng = np.random.default_rng(seed)
    if skew.kind == "hot" and not skew.repeat_ids:
        return _hot(skew, num_experts, tokens, top_k, rng)
    if skew.repeat_ids:
        share = np.exp(_log_weights(skew, num_experts))
        return rng.choice(num_experts, (tokens, top_k), p=share / share.sum())
    scores = np.broadcast_to(_log_weights(skew, num_experts), (tokens, num_experts))
    if skew.kind == "groups":
        groups, chosen = int(skew.numbers[0]), int(skew.numbers[1])
        order = np.argsort(rng.random((tokens, groups)), axis=1).argsort(axis=1)
        scores = np.where(np.repeat(order < chosen, num_experts // groups, axis=1), scores, -np.inf)
    if skew.kind == "together":
        apart = num_experts // int(skew.numbers[0])
        first = rng.integers(0, apart, (tokens, 1))
        scores = np.where(np.arange(num_experts) % apart == first, 1e6, scores)
    return _largest(scores + rng.gumbel(size=scores.shape), top_k)


def _log_weights(skew: Skew, num_experts: int) -> np.ndarray:
    if skew.kind == "zipf":
        place = np.random.default_rng(0).permutation(num_experts) + 1
        return -skew.numbers[0] * np.log(place)
    if skew.kind == "counts":
        return np.log(np.maximum(skew.weights, 1e-12 * max(skew.weights)))
    if skew.kind == "hot":
        part, hot = skew.numbers[0] / 100, int(skew.numbers[1])
        share = np.full(num_experts, (1 - part) / max(1, num_experts - hot))
        share[:hot] = part / hot if hot < num_experts else 1 / num_experts
        return np.log(np.maximum(share, 1e-300))
    return np.zeros(num_experts)


def _hot(skew: Skew, num_experts: int, tokens: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Each token takes floor or ceil of K p hot experts, so that the share is met and ids are distinct."""
    hot = int(skew.numbers[1])
    wanted = np.linspace(0, tokens * top_k * skew.numbers[0] / 100, tokens + 1).round().astype(int)
    taken = rng.permutation(np.diff(wanted))
    inside = np.argsort(rng.random((tokens, hot)), axis=1)
    outside = hot + np.argsort(rng.random((tokens, num_experts - hot)), axis=1)
    place = np.arange(top_k)
    from_hot = np.take_along_axis(inside, np.minimum(place, hot - 1)[None].repeat(tokens, 0), 1)
    cold = np.clip(place[None] - taken[:, None], 0, max(0, num_experts - hot - 1))
    from_cold = np.take_along_axis(outside, cold, 1) if num_experts > hot else from_hot
    return np.where(place[None] < taken[:, None], from_hot, from_cold)


def _largest(scores: np.ndarray, top_k: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :top_k].astype(np.int64)


class ScriptedRouter:
    """Ids come from a script, weights from a softmax of x W over the K places: gradients flow as in a real router."""

    def __init__(self, ops: Ops, width: int, top_k: int, ids_TK: np.ndarray) -> None:
        self._ops, self._width, self._top_k = ops, width, top_k
        self._ids_TK = ops.asarray(ids_TK)

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        name, shape = f"{prefix}w_router", (self._width, self._top_k)
        return (Parameter(name, shape, draw_dense(0, name, shape, 0.02), master=True),)

    def route(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Routing:
        ops, w_router = self._ops, params["w_router"]
        weights_TK = ops.softmax(ops.cast(x_TD, ops.dtype_of(w_router)) @ w_router)
        return Routing(self._ids_TK, self._ids_TK, weights_TK, {})

    def initial_state(self) -> dict[str, np.ndarray]:
        return {}

    def update_state(self, state: State, totals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(state)


def quick_values(parameters: Sequence[Parameter], seed: int) -> tuple[Parameter, ...]:
    """The same tensors with first values that cost little to draw (float32, uniform): for timings, where billions of
    normal ones would take longer than what is measured."""

    def drawn(parameter: Parameter) -> Parameter:
        shape = parameter.shape
        return replace(
            parameter,
            initial=lambda: (
                (np.random.default_rng(seed).random(shape, np.float32) - np.float32(0.5)) * np.float32(0.07)
            ),
        )

    return tuple(map(drawn, parameters))
