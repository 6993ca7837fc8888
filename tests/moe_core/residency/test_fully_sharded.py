"""FSEP by hand: LA-1 to LA-4 of the fact sheet, for each of an expert's named tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.backends.reference import ops
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.backends.reference.tape import grad, variable
from twinmoe.moe_core.config import MoeConfig
from twinmoe.moe_core.exactness import slice_piece
from twinmoe.moe_core.plan import SHARDS, Plan
from twinmoe.moe_core.residency.fully_sharded import FullySharded

WIDTH, PSI = 2, 8
MOE = MoeConfig(num_experts=4, top_k=1, expert_hidden_size=4, activation="gelu")
"""w_up (2, 4) and w_down (4, 2): 8 elements each, as the sheet's expert."""
PLACE = [[0, 1], [0, 1], [0, 2], [0, 3]]
WHOLE = 10 * np.arange(4)[:, None] + np.arange(PSI)


def plan_of(place: Sequence[Sequence[int]]) -> Plan:
    slots = np.array(place)
    empty = np.zeros((len(slots), slots.size), np.int64)
    return Plan(slots, np.full(slots.shape, SHARDS), (), empty, np.zeros(slots.size, np.int64))


@dataclass(frozen=True)
class Seen:
    """One rank: what it stores, its slots (C, Psi), the gradient of its shards (E, Psi / N), bytes sent."""

    stored: np.ndarray
    slots: np.ndarray
    shards: np.ndarray
    sent: int


def unshard(place: Sequence[Sequence[int]], upstream: np.ndarray) -> list[Seen]:
    """upstream (N, C, Psi): gradient of each slot; the two tensors of an expert are treated alike."""
    ranks = len(place)

    def body(comm: Communicator) -> Seen:
        group = comm.group("expert_weights", [list(range(ranks))])
        residency = FullySharded(ops, comm, group, MOE, WIDTH, 0, 0.1)
        params = {}
        for p in residency.parameters("", 0.1):
            flat = [slice_piece(WHOLE[e].astype(float), piece) for e, piece in enumerate(p.pieces)]
            params[p.name] = variable(np.stack(flat))
        before = len(comm.log)
        weights = residency.arrived(residency.gather(params, plan_of(place)))
        sent = sum(call.bytes_sent for call in comm.log[before:])
        assert weights.stacks is not None
        whole = ops.concat([stack.reshape((len(place[0]), PSI)) for stack in weights.stacks], 1)
        twice = np.concatenate([upstream[comm.rank]] * 2, 1)
        found = grad(whole, list(params.values()), twice)
        up, down = np.split(ops.to_numpy(whole), 2, 1)
        np.testing.assert_array_equal(up, down)
        np.testing.assert_array_equal(found[0], found[1])
        return Seen(ops.to_numpy(params["w_up"]), up, found[0], sent)

    return run_ranks(ranks, body)


def test_la1_a_rank_stores_one_part_of_every_expert() -> None:
    seen = unshard(PLACE, np.zeros((4, 2, PSI)))
    np.testing.assert_array_equal(seen[1].stored, [[2, 3], [12, 13], [22, 23], [32, 33]])
    assert seen[1].stored.size == 4 * PSI // 4


def test_la2_every_slot_is_a_whole_expert_and_the_volume_does_not_depend_on_the_layout() -> None:
    for place in (PLACE, [[0, 1], [2, 3], [0, 1], [2, 3]], [[3, 3], [2, 2], [1, 1], [0, 0]]):
        for rank, seen in enumerate(unshard(place, np.zeros((4, 2, PSI)))):
            np.testing.assert_array_equal(seen.slots, WHOLE[place[rank]])
            assert seen.sent == 2 * 8 * 12  # two tensors, float64: C Psi (N - 1) / N = 12 elements each


def test_la3_replicas_are_summed_and_an_expert_without_a_slot_gets_zero() -> None:
    slots = np.array([[1, 2], [2, 4], [3, 6], [4, 8]], float)
    for seen in unshard(PLACE, np.repeat(slots[:, :, None], PSI, 2)):
        np.testing.assert_array_equal(seen.shards, np.repeat([[10], [6], [6], [8]], 2, 1))
    same_rank = [[0, 0], [0, 1], [1, 1], [2, 2]]
    for seen in unshard(same_rank, np.repeat(slots[:, :, None], PSI, 2)):
        np.testing.assert_array_equal(seen.shards[:, 0], [1 + 2 + 2, 4 + 3 + 6, 4 + 8, 0])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([2, 4]), st.integers(2, 4))
def test_la4_weights_sent_back_as_gradients_come_home_once_per_replica(seed: int, ranks: int, slots: int) -> None:
    rng = np.random.default_rng(seed)
    place = np.concatenate([np.arange(4), rng.integers(0, 4, ranks * slots - 4)]) if ranks * slots >= 4 else None
    assert place is not None
    table = rng.permutation(place).reshape(ranks, slots)
    replicas = np.bincount(table.reshape(-1), minlength=4)
    for seen in unshard(table.tolist(), WHOLE[table].astype(float)):
        np.testing.assert_allclose(seen.shards, replicas[:, None] * seen.stored, rtol=0, atol=1e-12)


def test_an_empty_slot_is_zero() -> None:
    (first, _) = unshard([[0, -1, 1], [2, 3, -1]], np.ones((2, 3, PSI)))
    np.testing.assert_array_equal(first.slots[1], np.zeros(PSI))
    np.testing.assert_array_equal(first.shards, np.ones((4, 4)))


@pytest.mark.parametrize("ranks", [3, 5])
def test_experts_that_do_not_divide_are_padded_with_zeros_at_the_end(ranks: int) -> None:
    share = -(-PSI // ranks)
    seen = unshard([[0, 1, 2, 3]] * ranks, np.ones((ranks, 4, PSI)))
    for rank, own in enumerate(seen):
        np.testing.assert_array_equal(own.slots, WHOLE)
        assert own.stored.shape == (4, share)
        padded = max(0, (rank + 1) * share - PSI)
        np.testing.assert_array_equal(own.shards[:, share - padded :], 0)
        np.testing.assert_array_equal(own.shards[:, : share - padded], ranks)
