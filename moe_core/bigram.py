"""The yardstick beside a validation loss: a bigram model of the same training tokens.

p(b | a) = (c(a, b) + alpha p(b)) / (c(a) + alpha), p(b) = (c(b) + 1 / V) / (N + 1): the unigram fills in what
a has not shown. alpha is the one of `ALPHAS` that gives tokens held out of training the best likelihood.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .data import Data, GlobalBatch

ALPHAS = tuple(float(a) for a in np.geomspace(0.03, 3000.0, 16))
MOST_POSITIONS = 1 << 24
"""Positions counted per domain; of a larger one, evenly spaced runs."""
_DENSE_VOCABULARY = 2048
_HELD_RUN, _HELD_EVERY = 512, 10


@dataclass(frozen=True, eq=False)
class Counts:
    """Weights of pairs: keys a * V + b, ascending, and how often each occurs."""

    keys: np.ndarray
    weights: np.ndarray

    def plus(self, other: Counts, scale: float = 1.0) -> Counts:
        keys, place = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        return Counts(keys, np.bincount(place, np.concatenate([self.weights, scale * other.weights])))


class Bigram:
    """Counts turned into probabilities. V is the vocabulary's size."""

    def __init__(self, counts: Counts, vocab_size: int, alpha: float) -> None:
        first, second = np.divmod(counts.keys, vocab_size)
        total = counts.weights.sum()
        self.alpha = alpha
        self._counts = counts
        self._vocab_size = vocab_size
        self._context_V = np.bincount(first, counts.weights, vocab_size)
        self._unigram_V = (np.bincount(second, counts.weights, vocab_size) + 1 / vocab_size) / (total + 1)

    def log_likelihood(self, tokens_N: np.ndarray, targets_N: np.ndarray, alpha: float | None = None) -> np.ndarray:
        """log p(target | token), (N,) in nats."""
        alpha = self.alpha if alpha is None else alpha
        keys = tokens_N * self._vocab_size + targets_N
        place = np.minimum(np.searchsorted(self._counts.keys, keys), len(self._counts.keys) - 1)
        seen = np.where(self._counts.keys[place] == keys, self._counts.weights[place], 0.0)
        return np.log((seen + alpha * self._unigram_V[targets_N]) / (self._context_V[tokens_N] + alpha))


def fit_bigram(data: Data, most_positions: int = MOST_POSITIONS) -> Bigram:
    """Count the training tokens of `data`, each domain with its share of a batch, and choose alpha."""
    nothing = Counts(np.zeros(0, np.int64), np.zeros(0))
    fit, held = nothing, nothing
    counted = [_count_domain(data, d, most_positions) for d in range(len(data.domain_shares))]
    positions = sum(f.weights.sum() + h.weights.sum() for f, h in counted)
    for (f, h), share in zip(counted, data.domain_shares, strict=True):
        scale = share * positions / (f.weights.sum() + h.weights.sum())
        fit, held = fit.plus(f, scale), held.plus(h, scale)
    if not len(held.keys) or not len(fit.keys):
        return Bigram(fit.plus(held), data.vocab_size, 1.0)
    trial = Bigram(fit, data.vocab_size, 1.0)
    first, second = np.divmod(held.keys, data.vocab_size)
    scores = [held.weights @ trial.log_likelihood(first, second, alpha) for alpha in ALPHAS]
    return Bigram(fit.plus(held), data.vocab_size, ALPHAS[int(np.argmax(scores))])


def bigram_loss(data: Data, batches: Iterable[GlobalBatch]) -> float:
    """Mean negative log-likelihood (nats) of the targets that count, by a bigram of `data`'s training tokens."""
    model = fit_bigram(data)
    total, count = 0.0, 0
    for batch in batches:
        counts = batch.targets_SL >= 0
        total -= float(model.log_likelihood(batch.tokens_SL[counts], batch.targets_SL[counts]).sum())
        count += int(counts.sum())
    if not count:
        raise ValueError("bigram_loss needs at least one batch with targets; raise train.validation_batches")
    return total / count


def _count_domain(data: Data, domain: int, most_positions: int) -> tuple[Counts, Counts]:
    """(to fit, held out) pairs of one domain: every tenth run of positions is held out."""
    V = data.vocab_size
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    dense = np.zeros((2, V * V if V <= _DENSE_VOCABULARY else 0), np.int64)
    for tokens, targets in data.training_pairs(domain, most_positions):
        keys = tokens * V + targets
        held = np.arange(len(keys)) // _HELD_RUN % _HELD_EVERY == _HELD_EVERY - 1
        for side, mine in enumerate((keys[~held], keys[held])):
            if dense.size:
                dense[side] += np.bincount(mine, minlength=V * V)
            else:
                parts[side].append(mine)
    if dense.size:
        found = [np.flatnonzero(d) for d in dense]
        return Counts(found[0], dense[0, found[0]].astype(float)), Counts(found[1], dense[1, found[1]].astype(float))
    pairs = [np.unique(np.concatenate(p), return_counts=True) for p in parts]
    return Counts(pairs[0][0], pairs[0][1].astype(float)), Counts(pairs[1][0], pairs[1][1].astype(float))
