"""Assignments are permutations in equal shares; by_affinity is the best of all, from a table that remembers routing."""

from __future__ import annotations

import itertools
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.moe_core.assignment import (
    ONE,
    AffinityTable,
    Homes,
    assign,
    by_affinity,
    by_domain,
    pair_counts,
    round_robin,
)
from twinmoe.moe_core.config import DataConfig, TrainConfig
from twinmoe.moe_core.data import Data, GlobalBatch
from twinmoe.moe_core.data_packing import Domain
from twinmoe.moe_core.data_sources import Corpus

UNIT = 1 << 20


def batch_of(sequences: int = 8, length: int = 16) -> GlobalBatch:
    """Two domains, one of even and one of odd bytes."""
    rng = np.random.default_rng(0)
    docs = [[2 * rng.integers(0, 100, 60) + parity for _ in range(30)] for parity in (0, 1)]
    domains = tuple(Domain.from_documents(str(i), d, 256) for i, d in enumerate(docs))
    train = TrainConfig(global_batch_size=sequences, sequence_length=length)
    return Data(Corpus(domains, 256, 257), DataConfig(), train).batch(0)


def local_rows(local_SH: np.ndarray, rank_R: np.ndarray, order_S: np.ndarray) -> int:
    return int(local_SH[order_S, np.repeat(rank_R, len(order_S) // len(rank_R))].sum())


def best_by_trying_all(local_SH: np.ndarray, rank_R: np.ndarray) -> int:
    orders = itertools.permutations(range(len(local_SH)))
    return max(local_rows(local_SH, rank_R, np.array(o)) for o in orders)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))


# --- laws ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(shape=shapes, data=st.data())
def test_every_mode_permutes_in_equal_ascending_shares(shape: tuple[int, int], data: st.DataObject) -> None:
    ranks, share = shape
    sequences = ranks * share
    domain_S = np.array(data.draw(st.lists(st.integers(0, 3), min_size=sequences, max_size=sequences)))
    rank_R = np.array(data.draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)))
    rows = data.draw(st.lists(st.integers(0, 5), min_size=3 * sequences, max_size=3 * sequences))
    orders = [
        round_robin(domain_S, ranks),
        by_domain(domain_S, ranks),
        by_affinity(np.array(rows).reshape(sequences, 3), rank_R),
    ]
    for order in orders:
        assert sorted(order.tolist()) == list(range(sequences))
        assert (np.diff(order.reshape(ranks, share), axis=1) > 0).all()


@settings(max_examples=60, deadline=None)
@given(shape=st.sampled_from([(1, 3), (2, 2), (2, 3), (3, 2), (6, 1)]), data=st.data())
def test_by_affinity_keeps_as_many_rows_local_as_any_assignment(shape: tuple[int, int], data: st.DataObject) -> None:
    ranks, share = shape
    rank_R = np.array(data.draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)))
    rows = data.draw(st.lists(st.integers(0, 9), min_size=3 * ranks * share, max_size=3 * ranks * share))
    local_SH = np.array(rows).reshape(-1, 3)
    order = by_affinity(local_SH, rank_R)
    assert local_rows(local_SH, rank_R, order) == best_by_trying_all(local_SH, rank_R)
    assert np.array_equal(order, by_affinity(local_SH.copy(), rank_R.copy()))


def test_round_robin_gives_each_rank_its_part_of_every_domain() -> None:
    domain_S = np.array([0, 1] * 8)
    order = round_robin(domain_S, 4)
    assert [np.bincount(domain_S[share]).tolist() for share in order.reshape(4, 4)] == [[2, 2]] * 4


def test_by_domain_fills_neighbouring_ranks_with_a_domain() -> None:
    domain_S = np.array([0, 1] * 8)
    assert domain_S[by_domain(domain_S, 4)].tolist() == [0] * 8 + [1] * 8
    assert by_domain(domain_S, 4)[:4].tolist() == [0, 2, 4, 6]


# --- the table ------------------------------------------------------------------------------------------------


def test_pair_counts_leave_out_dropped_copies() -> None:
    counts = pair_counts(np.array([2, 0, 2]), np.array([[1, 0], [1, -1], [1, 2]]), num_tokens=3, num_experts=4)
    assert counts.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [1, 2, 1, 0]]


def test_the_table_decays_as_its_docstring_says() -> None:
    table = AffinityTable(1, 2, decay="0.75")
    table.update(np.array([[4, 1]]))
    table.update(np.array([[0, 2]]))
    assert table.table_VE.tolist() == [[3 * ONE, 3 * ONE // 4 + 2 * ONE]]
    for _ in range(200):
        table.update(np.array([[0, 0]]))
    assert not table.table_VE.any()


def test_counts_summed_over_ranks_equal_counts_of_the_whole() -> None:
    rng = np.random.default_rng(1)
    tokens, ids = rng.integers(0, 9, 40), rng.integers(-1, 5, (40, 2))
    parts = sum(pair_counts(tokens[i::4], ids[i::4], 9, 5) for i in range(4))
    assert np.array_equal(parts, pair_counts(tokens, ids, 9, 5))


def test_expected_rows_by_hand() -> None:
    # Token 0 goes to expert 0; token 1 half to 1, half to 2; token 2 is unseen: like all, 2/4, 1/4, 1/4.
    table = AffinityTable(3, 3)
    table.update(np.array([[2, 0, 0], [0, 1, 1], [0, 0, 0]]))
    homes = Homes(np.array([0, 0, 1]), np.array([0, 1]))
    tokens = np.array([[0, 0, 1, 2], [1, 1, 1, 1]])
    real = np.array([[True] * 4, [True, True, False, False]])
    expected = np.array([[2 + 0.5 + 0.75, 0.5 + 0.25], [1, 1]]) * UNIT
    assert table.expected_local_rows(tokens, real, homes).tolist() == expected.tolist()


def test_experts_of_several_layers_lie_end_to_end() -> None:
    table = AffinityTable(2, 4)
    table.update(np.array([[1, 0, 0, 1], [0, 1, 1, 0]]))
    homes = Homes(np.array([0, 1, 1, 0]), np.array([0, 1]))
    rows = table.expected_local_rows(np.array([[0], [1]]), np.ones((2, 1), bool), homes)
    assert rows.tolist() == [[UNIT, 0], [0, UNIT]]


def test_a_table_from_a_checkpoint_gives_the_same_order_and_another_shape_is_refused() -> None:
    batch, homes = batch_of(), Homes(np.arange(4) // 2, np.arange(2))
    table = AffinityTable(257, 4)
    table.update(np.random.default_rng(0).integers(0, 9, (257, 4)))
    again = AffinityTable(257, 4)
    again.load(table.state())
    assert np.array_equal(
        assign("by_affinity", batch, homes, table).positions_S, assign("by_affinity", batch, homes, again).positions_S
    )
    with pytest.raises(ValueError, match="resume with the model"):
        AffinityTable(257, 8).load(table.state())
    with pytest.raises(ValueError, match="do not fit"):
        table.update(np.zeros((3, 4), int))
    with pytest.raises(ValueError, match="must lie in"):
        AffinityTable(3, 3, Fraction(3, 2))


# --- on batches ---------------------------------------------------------------------------------------------------


def test_by_affinity_finds_the_domains_when_experts_follow_them() -> None:
    batch = batch_of(sequences=8)
    nodes = Homes(expert_E=np.array([0, 0, 1, 1]), rank_R=np.array([0, 0, 1, 1]))
    table = AffinityTable(257, 4)
    even_to_node_1 = np.where(np.arange(257) % 2 == 0, 2, 0)[batch.tokens_SL.reshape(-1)]
    table.update(pair_counts(batch.tokens_SL.reshape(-1), even_to_node_1[:, None], 257, 4))
    assigned = assign("by_affinity", batch, nodes, table)
    assert assigned.domain_S.tolist() == [1] * 4 + [0] * 4


@pytest.mark.parametrize("mode", ["round_robin", "by_domain", "by_affinity"])
def test_assigned_batches_hold_the_same_sequences_and_totals(mode: str) -> None:
    batch, homes = batch_of(), Homes(np.arange(4), np.arange(4))
    table = AffinityTable(257, 4)
    table.update(np.random.default_rng(0).integers(0, 9, (257, 4)))
    assigned = assign(mode, batch, homes, table)
    assert (assigned.total_targets, assigned.total_tokens) == (batch.total_targets, batch.total_tokens)
    back = assigned.take(np.argsort(assigned.positions_S))
    assert np.array_equal(back.tokens_SL, batch.tokens_SL)
    assert np.array_equal(back.targets_SL, batch.targets_SL)


def test_by_affinity_deals_in_turn_until_it_has_seen_routing() -> None:
    batch, homes = batch_of(), Homes(np.arange(4), np.arange(4))
    dealt = assign("round_robin", batch, homes).positions_S
    assert np.array_equal(assign("by_affinity", batch, homes).positions_S, dealt)
    assert np.array_equal(assign("by_affinity", batch, homes, AffinityTable(257, 4)).positions_S, dealt)


@pytest.mark.parametrize("mode", ["round_robin", "by_domain", "by_affinity"])
def test_ragged_shares_and_unknown_modes_are_refused(mode: str) -> None:
    table = AffinityTable(257, 3)
    table.update(np.ones((257, 3), int))
    with pytest.raises(ValueError, match="multiple of 3"):
        assign(mode, batch_of(sequences=8), Homes(np.arange(3), np.arange(3)), table)
    with pytest.raises(ValueError, match="choose round_robin"):
        assign("random", batch_of(), Homes(np.arange(4), np.arange(4)))


def test_64_sequences_of_256_tokens_take_under_5_milliseconds() -> None:
    batch = batch_of(sequences=64, length=256)
    homes = Homes(np.tile(np.arange(64) // 8, 4), np.arange(8))
    table = AffinityTable(257, 256)
    table.update(np.random.default_rng(0).integers(0, 99, (257, 256)))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assign("by_affinity", batch, homes, table)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.005
