"""The yardstick is a proper model of the training tokens: it sums to one, approaches the entropy, ignores padding."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from twinmoe.moe_core.bigram import Bigram, Counts, bigram_loss, fit_bigram
from twinmoe.moe_core.config import DataConfig, TrainConfig
from twinmoe.moe_core.data import Data, open_data
from twinmoe.moe_core.data_packing import Domain
from twinmoe.moe_core.data_sources import Corpus


def data_of(domains: list[list[np.ndarray]], boundary: int, **config: object) -> Data:
    made = tuple(Domain.from_documents(str(i), d, boundary) for i, d in enumerate(domains))
    train = TrainConfig(global_batch_size=4, sequence_length=32)
    return Data(Corpus(made, boundary, boundary + 1), DataConfig.model_validate(config), train)


def chain(tokens: int, boundary: int, seed: int) -> list[np.ndarray]:
    """Documents of a chain that stays on its token with probability 0.9, else draws one of `boundary`."""
    rng = np.random.default_rng(seed)
    draws, jumps = rng.integers(0, boundary, tokens), rng.random(tokens) > 0.9
    jumps[0] = True
    walk = draws[np.maximum.accumulate(np.where(jumps, np.arange(tokens), 0))]
    return np.array_split(walk, tokens // 1000)


def test_probability_of_a_hand_counted_pair() -> None:
    # Pairs (0,1) twice, (0,0) and (1,0) once; V = 2: p(1) = (2 + 1/2) / 5, p(1|0) = (2 + 3 * 0.5) / (3 + 3)
    model = Bigram(Counts(np.array([0, 1, 2]), np.array([1.0, 2.0, 1.0])), 2, alpha=3.0)
    assert np.exp(model.log_likelihood(np.array([0]), np.array([1])))[0] == pytest.approx(3.5 / 6)
    # (1,1) was never seen: all of it comes from the unigram
    assert np.exp(model.log_likelihood(np.array([1]), np.array([1])))[0] == pytest.approx(1.5 / 4)


@pytest.mark.parametrize("boundary", [20, 5000])
def test_probabilities_of_each_context_sum_to_one_and_unseen_pairs_are_possible(boundary: int) -> None:
    model = fit_bigram(data_of([chain(20_000, boundary, 0), chain(5_000, boundary, 1)], boundary))
    for context in (0, 7, boundary):
        tokens = np.full(boundary + 1, context)
        likelihood = model.log_likelihood(tokens, np.arange(boundary + 1))
        assert np.isfinite(likelihood).all()
        assert np.exp(likelihood).sum() == pytest.approx(1.0)


def test_loss_of_a_markov_chain_is_its_entropy() -> None:
    data = data_of([chain(200_000, 20, 0)], 20)
    stay, go = 0.9 + 0.1 / 20, 0.1 / 20
    entropy = -(stay * np.log(stay) + 19 * go * np.log(go))
    loss = bigram_loss(data, map(data.validation_batch, range(data.validation_batches)))
    assert loss == pytest.approx(entropy, rel=0.06)


def test_large_vocabularies_count_as_small_ones_do() -> None:
    documents = [np.random.default_rng(i).integers(0, 30, 300) for i in range(10)]
    small, large = data_of([documents], 30), data_of([documents], 4000)
    a, b = fit_bigram(small), fit_bigram(large)
    assert a._counts.weights.tolist() == b._counts.weights.tolist()
    assert a._counts.weights.sum() == small._train[0].positions


def test_domains_weigh_as_in_a_batch() -> None:
    rare, common = [np.zeros(40, int)] * 30, [np.ones(40, int)] * 300
    even = fit_bigram(data_of([rare, common], 2))
    flat = fit_bigram(data_of([rare, common], 2, domain_mix="proportional"))
    assert even._unigram_V[0] == pytest.approx(even._unigram_V[1], rel=1e-3)
    assert flat._unigram_V[1] / flat._unigram_V[0] == pytest.approx(10, rel=0.05)


def test_padding_does_not_count() -> None:
    data = data_of([[np.arange(25) % 5] * 9], 5)
    batch = data.validation_batch(0)
    assert not batch.real_SL.all()
    padded = replace(batch, tokens_SL=np.where(batch.real_SL, batch.tokens_SL, 3))
    assert bigram_loss(data, [batch]) == bigram_loss(data, [padded])
    with pytest.raises(ValueError, match="at least one batch"):
        bigram_loss(data, [])


def test_a_corpus_of_a_few_tokens_has_a_finite_loss() -> None:
    data = data_of([[np.array([1, 2])]], 5)
    assert np.isfinite(bigram_loss(data, [data.validation_batch(0)]))


def test_the_standard_library_is_fitted_in_seconds() -> None:
    data = open_data(DataConfig(), TrainConfig())
    start = time.perf_counter()
    loss = bigram_loss(data, map(data.validation_batch, range(4)))
    assert time.perf_counter() - start < 3
    assert 2.2 < loss < 2.9
