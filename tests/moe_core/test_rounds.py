"""Rounds of a layer: rows that a rank holds at once, what happens over the budget, what overlaps."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from twinmoe.backends import reference
from twinmoe.backends.protocol import Launch
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.backends.reference.tape import grad, variable
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.combinations import ConfigError, check_combinations
from twinmoe.moe_core.config import Config, MoeConfig, ParallelConfig
from twinmoe.moe_core.layer import LayerStats, MoELayer
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.planners.budget import RowBudgetError
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.moe_core.transformer import scoped
from twinmoe.testing.conftest import load_or_skip

WIDTH, TOKENS, RANKS = 8, 12, 4
MOE = MoeConfig(num_experts=8, top_k=2, expert_hidden_size=4)
EVERYTHING = RANKS * TOKENS * MOE.top_k
"""Rows of rank 0, whose two experts everyone chooses."""
LLEP = {
    "planner": "least_loaded",
    "residency": "borrowed",
    "least_loaded": {"min_rows": 1, "imbalance_threshold": None},
}


class HeldRows:
    """Operations that count, per rank, the rows whose input to the experts is alive."""

    def __init__(self) -> None:
        self._lock, self.now, self.most = threading.RLock(), [0] * RANKS, [0] * RANKS

    def of(self, rank: int) -> Any:
        return SimpleNamespace(**{**vars(reference.ops), "expert_mlp": self._counted(rank)})

    def _counted(self, rank: int) -> Callable[..., Any]:
        def expert_mlp(x_ND: Any, *others: Any) -> Any:
            self._add(rank, len(x_ND.value))
            weakref.finalize(x_ND.value, self._add, rank, -len(x_ND.value))
            return reference.ops.expert_mlp(x_ND, *others)

        return expert_mlp

    def _add(self, rank: int, rows: int) -> None:
        with self._lock:
            self.now[rank] += rows
            self.most[rank] = max(self.most[rank], self.now[rank])


@dataclass(frozen=True)
class Seen:
    """One rank, forward and backward."""

    y: np.ndarray
    grads: list[np.ndarray]
    stats: LayerStats
    collectives: list[str]


def run(parallel: dict[str, Any], held: HeldRows | None = None, ranks: int = RANKS) -> list[Seen]:
    """A layer all of whose tokens choose experts 0 and 1."""
    config = ParallelConfig.model_validate(parallel)

    def body(comm: Communicator) -> Seen:
        ops = reference.ops if held is None else held.of(comm.rank)
        parts = build_layer(MOE, config, make_runtime(ops, comm, Mesh.over(ranks, ranks), config), LayerSpec(WIDTH, ""))
        params = {p.name: variable(p.initial()) for p in parts.parameters}
        router = np.zeros((WIDTH, MOE.num_experts))
        router[0, :2] = 5.0, 4.0
        params["w_router"] = variable(router)
        x = np.random.default_rng(comm.rank).standard_normal((TOKENS, WIDTH))
        x[:, 0] = np.abs(x[:, 0]) + 1
        x_TD, before = variable(x), len(comm.log)
        out = parts.layer(scoped(params, ""), x_TD, Tokens(2, float(TOKENS * ranks)), Memo())
        log = [call.name for call in comm.log[before:]]
        grads = grad(out.y, [x_TD, *params.values()], x[::-1])
        assert out.stats is not None
        return Seen(reference.ops.to_numpy(out.y), grads, out.stats, log)

    return run_ranks(ranks, body)


def assert_same(left: list[Seen], right: list[Seen]) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a.y, b.y, rtol=0, atol=1e-13)
        for d_a, d_b in zip(a.grads, b.grads, strict=True):
            np.testing.assert_allclose(d_a, d_b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transport", ["flat", "hierarchical_dedup"])
def test_no_rank_holds_more_rows_than_its_budget_forward_or_backward(transport: str) -> None:
    free, bounded = HeldRows(), HeldRows()
    whole = run({"transport": transport}, free)
    assert free.most[0] == EVERYTHING == 96
    rounds = run({"transport": transport, "max_rows_per_rank": 10}, bounded)
    assert max(bounded.most) <= 10
    assert_same(whole, rounds)
    assert {seen.stats.plan.rounds for seen in rounds if seen.stats.plan} == {10}
    assert len({tuple(seen.collectives) for seen in rounds}) == 1


def test_a_budget_spills_before_it_chunks() -> None:
    lenient = {**LLEP, "least_loaded": {"min_rows": 1, "alpha": 2, "imbalance_threshold": 5}}
    held = HeldRows()
    seen = run({**lenient, "max_rows_per_rank": EVERYTHING // RANKS}, held)
    assert held.most == [EVERYTHING // RANKS] * RANKS
    assert [s.stats.plan.rounds for s in seen if s.stats.plan] == [1] * RANKS
    assert_same(run({}), seen)
    both = HeldRows()
    spilled = run({**LLEP, "max_rows_per_rank": 10}, both)
    assert max(both.most) <= 10
    assert [s.stats.plan.rounds for s in spilled if s.stats.plan] == [3] * RANKS
    assert_same(seen, spilled)


def test_borrowed_weights_travel_once_for_all_rounds() -> None:
    whole, rounds = run(LLEP), run({**LLEP, "max_rows_per_rank": 10})
    assert whole[0].collectives.count("all_to_all") == 1 + 2
    assert rounds[0].collectives.count("all_to_all") == 1 + 2 * 3


def test_a_group_of_one_rank_keeps_its_budget_too() -> None:
    held = HeldRows()
    assert_same(run({}, ranks=1), run({"max_rows_per_rank": 7}, held, ranks=1))
    assert held.most[0] == 7


def test_over_budget_every_rank_fails_before_a_row_has_moved() -> None:
    moved: list[str] = []

    def body(comm: Communicator) -> str:
        config = ParallelConfig(max_rows_per_rank=3, over_budget="error")
        runtime = make_runtime(reference.ops, comm, Mesh.over(2, 2), config)
        parts = build_layer(MOE, config, runtime, LayerSpec(WIDTH, ""))
        params = {p.name: variable(p.initial()) for p in parts.parameters}
        x_TD, before = variable(np.ones((TOKENS, WIDTH))), len(comm.log)
        with pytest.raises(RowBudgetError, match=r"rank \d would compute \d+ rows .* over_budget=chunk") as caught:
            parts.layer(scoped(params, ""), x_TD, Tokens(2, 2.0 * TOKENS), Memo())
        moved.extend(call.name for call in comm.log[before:] if call.name != "gather_to_host")
        return str(caught.value)

    assert len(set(run_ranks(2, body))) == 1
    assert moved == []


@pytest.mark.parametrize("parallel", [{"max_rows_per_rank": 10}, {"overlap_chunks": 3}])
def test_bytes_of_all_rounds_are_those_of_the_whole_plan(parallel: dict[str, Any]) -> None:
    for whole, rounds in zip(run({}), run(parallel), strict=True):
        (a,), (b,) = whole.stats.exchange.traffic, rounds.stats.exchange.traffic
        np.testing.assert_array_equal(a.sent, b.sent)


def test_rows_of_the_next_chunk_leave_before_a_chunk_is_computed() -> None:
    def body(comm: Communicator) -> list[str]:
        diary: list[str] = []
        config = ParallelConfig(overlap_chunks=3)
        ops = SimpleNamespace(**{**vars(reference.ops), "expert_mlp": _noted(diary)})
        parts = build_layer(MOE, config, make_runtime(ops, comm, Mesh.over(2, 2), config), LayerSpec(WIDTH, ""))  # type: ignore[arg-type]
        assert isinstance(parts.layer, MoELayer)
        layer = replace(parts.layer, transport=_noted_transport(parts.layer.transport, diary))
        params = {p.name: variable(p.initial()) for p in parts.parameters}
        x_TD = variable(np.random.default_rng(comm.rank).standard_normal((TOKENS, WIDTH)))
        layer(scoped(params, ""), x_TD, Tokens(2, 2.0 * TOKENS), Memo())
        return diary

    for diary in run_ranks(2, body):
        assert diary == [
            *("dispatch_start", "dispatch_start", "dispatch_finish", "compute", "combine_start"),
            *("dispatch_start", "dispatch_finish", "compute", "combine_start"),
            *("dispatch_finish", "compute", "combine_start"),
            *("combine_finish", "combine_finish", "combine_finish"),
        ]


def _noted(diary: list[str]) -> Callable[..., Any]:
    def expert_mlp(*arguments: Any) -> Any:
        diary.append("compute")
        return reference.ops.expert_mlp(*arguments)

    return expert_mlp


def _noted_transport(inner: Any, diary: list[str]) -> Any:
    def noted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            diary.append(name)
            return getattr(inner, name)(*arguments)

        return call

    names = [f"{what}{when}" for what in ("dispatch", "combine") for when in ("", "_start", "_finish")]
    return SimpleNamespace(**{name: noted(name) for name in names})


@pytest.mark.parametrize(
    "parallel",
    [
        {"overlap_chunks": 2, "transport": "hierarchical_dedup"},
        {"overlap_chunks": 2, "tensor_parallel_size": 2},
    ],
)
def test_what_cannot_overlap_is_refused_with_the_remedy(parallel: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match="groupwise, or overlap_chunks 1"):
        check_combinations(Config(parallel=ParallelConfig.model_validate(parallel)))


def test_a_backend_whose_exchanges_cannot_overlap_refuses_by_name() -> None:
    home = load_or_skip("mindspore-cpu")
    comm = home.comm.connect(Launch())
    config = ParallelConfig(overlap_chunks=2)
    runtime = make_runtime(home.ops, comm, Mesh(), config)
    with pytest.raises(ValueError, match=r"overlap_chunks=2: .* MindSpore's functional differentiation\); set"):
        build_layer(MOE, config, runtime, LayerSpec(WIDTH, ""))
