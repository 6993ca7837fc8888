"""Data assignment in a loop: the loss stays, the homes change, affinity is learnt from the statistics."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.backends.registry import Backend, load
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.data import GlobalBatch
from twinmoe.moe_core.routing.arrangement import Arrangement, arrangement_of
from twinmoe.testing.moe_core.routing.support import gate_logits, settings

SEQUENCES, LENGTH = 4, 6
MOE = settings(num_experts=4, top_k=1, locality_nodes=2)


def batch() -> GlobalBatch:
    """Sequences 0 and 2 hold ids 0 to 5, sequences 1 and 3 ids 6 to 11; domains alternate."""
    domain = np.arange(SEQUENCES) % 2
    tokens = np.arange(LENGTH)[None] + LENGTH * domain[:, None]
    real = np.ones(tokens.shape, bool)
    return GlobalBatch(tokens, tokens, real, np.zeros_like(tokens), np.arange(SEQUENCES), domain, 24, 24)


def statistics(home: Backend, given: GlobalBatch) -> Any:
    """Ids 0 to 5 go to experts of node 1, the others to node 0."""
    logits = np.where(given.tokens_SL.reshape(-1, 1) < LENGTH, [[0, 0, 0, 1.0]], [[1.0, 0, 0, 0]])
    fields = {"sequences": SEQUENCES, "sequence_positions": given.positions_S, "global_sequences": SEQUENCES}
    return gate_logits(home, MOE, logits, token_ids_T=given.tokens_SL.reshape(-1), **fields).device.statistics


def local_rows(home: Backend, given: GlobalBatch) -> int:
    return int(np.trace(home.ops.to_numpy(statistics(home, given)["node_rows"]).reshape(2, 2)))


@pytest.mark.parametrize("mode", ["round_robin", "by_domain", "by_affinity"])
def test_an_arrangement_is_a_permutation_with_positions_counted_anew(mode: str) -> None:
    arranged = Arrangement(mode, 2, 32).arrange(batch())
    assert arranged.positions_S.tolist() == [0, 1, 2, 3]
    assert sorted(arranged.tokens_SL[:, 0].tolist()) == [0, 0, 6, 6]
    assert arranged.total_tokens == 24
    if mode == "by_domain":
        assert arranged.domain_S.tolist() == [0, 0, 1, 1]
    else:
        assert sorted(arranged.domain_S[:2].tolist()) == [0, 1]


def test_affinity_learns_where_tokens_go(home: Backend) -> None:
    ops, arrangement = home.ops, Arrangement("by_affinity", 2, 32)
    dealt = arrangement.arrange(batch())
    assert local_rows(home, dealt) == 12
    arrangement.observe(ops, [statistics(home, dealt)] * 2)
    run_ranks(1, lambda comm: arrangement.update(comm, comm.group("world", [[0]])))
    learnt = arrangement.arrange(batch())
    assert local_rows(home, learnt) == 24
    again = Arrangement("by_affinity", 2, 32)
    again.restore(json.loads(json.dumps(arrangement.as_json())))
    np.testing.assert_array_equal(again.arrange(batch()).domain_S, learnt.domain_S)


def test_every_rank_finds_the_same_order() -> None:
    home = load("reference")

    def body(comm: Any) -> list[int]:
        arrangement = Arrangement("by_affinity", 2, 32)
        whole, world = arrangement.arrange(batch()), comm.group("world", [[0, 1]])
        logits = np.where(
            whole.for_rank(comm.rank, 2).tokens_SL.reshape(-1, 1) < LENGTH, [[0, 0, 0, 1.0]], [[1.0, 0, 0, 0]]
        )
        mine = whole.for_rank(comm.rank, 2)
        routed = gate_logits(
            home, MOE, logits, sequences=2, token_ids_T=mine.tokens_SL.reshape(-1),
            sequence_positions=mine.positions_S, global_sequences=SEQUENCES,
        )  # fmt: skip
        arrangement.observe(home.ops, [routed.device.statistics])
        arrangement.update(comm, world)
        return arrangement.arrange(batch()).domain_S.tolist()

    assert run_ranks(2, body) == [[1, 1, 0, 0]] * 2


def test_modes_without_a_table_observe_nothing(home: Backend) -> None:
    arrangement = Arrangement("by_domain", 2, 32)
    arrangement.observe(home.ops, [{}])
    run_ranks(1, lambda comm: arrangement.update(comm, comm.group("world", [[0]])))
    assert arrangement.as_json() == {}
    arrangement.restore({})


def config(mode: str, nodes: int) -> Config:
    return Config.model_validate({"moe": {"locality_nodes": nodes}, "parallel": {"data_assignment": mode}})


def test_without_virtual_nodes_ranks_do_not_show_in_positions() -> None:
    drawn = arrangement_of(config("round_robin", 1), token_ranks=4).arrange(batch())
    assert drawn.positions_S.tolist() == [0, 1, 2, 3]
    by_domain = arrangement_of(config("by_domain", 1), token_ranks=2).arrange(batch())
    assert by_domain.positions_S.tolist() == [0, 2, 1, 3]
    with pytest.raises(ValueError, match=r"set moe\.locality_nodes to 2 or more"):
        arrangement_of(config("by_affinity", 1), token_ranks=4)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_with_virtual_nodes_the_order_does_not_depend_on_ranks(ranks: int) -> None:
    arranged = arrangement_of(config("by_domain", 2), token_ranks=ranks).arrange(batch())
    assert arranged.domain_S.tolist() == [0, 0, 1, 1]
