"""Hash, random routed experts (PanGu-Sigma) and the hierarchical router."""

from __future__ import annotations

import numpy as np
import pytest
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.routing.keyed import balanced_table
from twinmoe.testing.moe_core.routing.support import host_softmax, route, settings

X = np.random.default_rng(0).standard_normal((24, 8))
IDS = np.arange(24) % 12


def test_a_table_gives_every_expert_three_of_twelve_ids() -> None:
    table = balanced_table(12, 4, 1, 0, "hash", 0)
    assert np.bincount(table[:, 0], minlength=4).tolist() == [3, 3, 3, 3]
    assert not np.array_equal(table, balanced_table(12, 4, 1, 0, "hash", 1))
    np.testing.assert_array_equal(table, balanced_table(12, 4, 1, 0, "hash", 0))


def test_more_choices_are_distinct_and_each_column_is_balanced() -> None:
    table = balanced_table(257, 8, 3, 0, "hash", 0)
    assert all(len(set(row)) == 3 for row in table.tolist())
    for column in table.T:
        counts = np.bincount(column, minlength=8)
        assert counts.max() - counts.min() <= 1


def test_balance_is_by_ids_not_by_frequency() -> None:
    """Zipf ids: one table's busiest expert has over a third of the tokens (the sheet: .097 to .389)."""
    frequency = 1 / np.arange(1, 13)
    table = balanced_table(12, 4, 1, 0, "hash", 0)[:, 0]
    loads = np.bincount(table, weights=frequency / frequency.sum(), minlength=4)
    assert loads.max() > 1.3 * loads.min()


def test_hash_depends_on_id_and_layer_only(home: Backend) -> None:
    moe = settings(router="hash", num_experts=4, top_k=2)
    first = route(home, moe, X, token_ids_T=IDS, vocab_size=12)
    again = route(home, moe, -3 * X, token_ids_T=IDS, vocab_size=12)
    np.testing.assert_array_equal(first.chosen, again.chosen)
    np.testing.assert_array_equal(first.chosen[:12], first.chosen[12:])
    assert not np.array_equal(first.chosen, route(home, moe, X, token_ids_T=IDS, vocab_size=12, layer=1).chosen)
    np.testing.assert_array_equal(first.weights, np.full((24, 2), 0.5))
    assert first.losses == {}


DOMAINS = np.array([0, 1, 1, 4])


@pytest.mark.parametrize("inner", ["random", "topk", "grap"])
def test_the_domain_picks_the_group(home: Backend, inner: str) -> None:
    moe = settings(router="hierarchical", num_experts=8, num_groups=2, top_k=2, inner_router=inner)
    routed = route(home, moe, X, sequences=4, domains_S=DOMAINS, token_ids_T=IDS, vocab_size=12)
    group = routed.chosen // 4
    np.testing.assert_array_equal(group, np.repeat(DOMAINS % 2, 6)[:, None] * np.ones((1, 2)))
    np.testing.assert_allclose(routed.weights.sum(1), 1.0, rtol=1e-12)
    assert (routed.chosen[:, 0] != routed.chosen[:, 1]).all()


def test_random_routing_depends_on_domain_id_and_layer_only(home: Backend) -> None:
    moe = settings(router="random_routed", num_experts=8, num_groups=2, top_k=1, inner_router="topk")
    fields = {"sequences": 2, "domains_S": np.array([0, 1]), "token_ids_T": IDS, "vocab_size": 12}
    first = route(home, moe, X, **fields)
    np.testing.assert_array_equal(first.chosen, route(home, moe, 5 - X, **fields).chosen)
    assert np.bincount(first.chosen[:, 0], minlength=8).tolist() == [3] * 8
    assert not np.array_equal(first.chosen[:12], first.chosen[12:] - 4)
    assert not np.array_equal(first.chosen, route(home, moe, X, layer=1, **fields).chosen)


def test_inner_gates_are_softmaxes_over_the_group(home: Backend) -> None:
    w = np.random.default_rng(1).standard_normal((8, 8))
    learned = settings(
        router="domain", num_experts=8, num_groups=2, top_k=1, inner_router="topk", aux_loss_coeff=1.0,
        aux_loss_scope="global", z_loss_coeff=1.0,
    )  # fmt: skip
    fields = {"sequences": 2, "domains_S": np.array([0, 1])}
    routed = route(home, learned, X, w, **fields)
    logits = np.stack([row[:4] if t < 12 else row[4:] for t, row in enumerate(X @ w)])
    np.testing.assert_array_equal(routed.chosen[:, 0] % 4, logits.argmax(1))
    np.testing.assert_allclose(routed.weights[:, 0], host_softmax(logits).max(1), rtol=1e-12)
    shares = np.zeros((24, 8))
    shares[:12, :4], shares[12:, 4:] = host_softmax(logits[:12]), host_softmax(logits[12:])
    f = np.bincount(routed.chosen[:, 0], minlength=8) / 24
    np.testing.assert_allclose(routed.losses["load_balance"], 8 * (f * shares.mean(0)).sum(), rtol=1e-12)
    pooled = route(home, learned.model_copy(update={"inner_router": "grap"}), X, **fields)
    means = X.reshape(24, 4, 2).mean(-1)
    np.testing.assert_array_equal(pooled.chosen[:, 0], means.argmax(1) + np.repeat([0, 4], 12))
    np.testing.assert_allclose(pooled.weights[:, 0], host_softmax(means).max(1), rtol=1e-12)


def test_what_is_missing_is_named(home: Backend) -> None:
    hashed = settings(router="hash", num_experts=4, top_k=1)
    with pytest.raises(ValueError, match="build it with vocab_size"):
        route(home, hashed, X, vocab_size=None)
    with pytest.raises(ValueError, match="pass the ids with the vectors"):
        route(home, hashed, X)
    grouped = settings(router="hierarchical", num_experts=4, num_groups=2, top_k=1)
    with pytest.raises(ValueError, match="needs the domain of every sequence"):
        route(home, grouped, X, token_ids_T=IDS)
    with pytest.raises(ValueError, match="equal groups of at least"):
        route(home, settings(router="hierarchical", num_experts=6, num_groups=4, top_k=1), X)
    with pytest.raises(ValueError, match="8 channels into 3 equal blocks"):
        route(home, settings(router="hierarchical", num_experts=6, num_groups=2, top_k=1, inner_router="grap"), X)
