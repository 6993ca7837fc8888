"""LL-10, LL-11 and LL-13 as laws over random counts, up to 64 ranks and 512 experts."""

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.moe_core.plan import Plan
from twinmoe.moe_core.planners.least_loaded import (
    LeastLoadedOptions,
    plan_least_loaded,
    plan_least_loaded_sharded,
    share_of_rank,
)
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table

LAWS = settings(deadline=None, max_examples=80)
ALPHAS = (Fraction(1), Fraction(11, 10), Fraction(13, 10), Fraction(2))


@dataclass(frozen=True)
class Instance:
    counts: np.ndarray
    table: np.ndarray
    owner: np.ndarray


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Skew from none to all rows on one expert; some ranks and experts without rows; shares that do not divide."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranks = draw(st.integers(1, 64))
    num_experts = draw(st.integers(1, 512))
    shares = rng.dirichlet(np.full(num_experts, draw(st.sampled_from([0.005, 0.05, 0.5, 50.0]))))
    copies = rng.integers(0, draw(st.sampled_from([2, 50, 5000])), ranks)
    counts = np.stack([rng.multinomial(n, shares) for n in copies]).astype(np.int64)
    owner = owners(num_experts, ranks)
    return Instance(counts, slot_table(owner, ranks), owner)


def options() -> st.SearchStrategy[LeastLoadedOptions]:
    return st.builds(
        LeastLoadedOptions,
        alpha=st.sampled_from(ALPHAS),
        lambda_=st.sampled_from([None, Fraction(2)]),
        min_rows=st.sampled_from([1, 7, 300]),
        min_rows_far=st.sampled_from([None, 40]),
        small_remainder=st.sampled_from(["prose", "pseudocode"]),
        spill_order=st.sampled_from(["global", "source_first"]),
        max_borrowed=st.sampled_from([None, 0, 1, 3]),
        max_rows_per_rank=st.sampled_from([None, 100]),
    )


def with_nodes(chosen: LeastLoadedOptions, ranks: int, per_node: int) -> LeastLoadedOptions:
    return replace(chosen, node_of=tuple((np.arange(ranks) // per_node).tolist()))


def as_bytes(plan: Plan) -> bytes:
    parts = [plan.slots, plan.weight_from, plan.flow, plan.round, *plan.order]
    return b"|".join(np.ascontiguousarray(part).tobytes() for part in parts)


def native(instance: Instance) -> np.ndarray:
    return np.bincount(instance.owner, instance.counts.sum(0), len(instance.table)).astype(np.int64)


@LAWS
@given(instances(), options(), st.integers(1, 8))
def test_rows_are_conserved_and_slots_are_where_residency_expects_them(instance, chosen, per_node):
    chosen = with_nodes(chosen, len(instance.table), per_node)
    plan = plan_least_loaded(instance.counts, instance.table, chosen)
    plan.check(instance.counts)
    width = instance.table.shape[1]
    native_slots = instance.table >= 0
    np.testing.assert_array_equal(plan.slots[:, :width][native_slots], instance.table[native_slots])
    for rank, slots in enumerate(plan.slots):
        held = slots[slots >= 0]
        assert len(set(held.tolist())) == len(held), "two slots of one expert on one rank"
        assert (slots[: len(held)] >= 0).all(), "a hole before a filled slot"
        own = int(native_slots[rank].sum())
        assert (np.diff(held[own:]) > 0).all()
        np.testing.assert_array_equal(plan.weight_from[rank, own : len(held)], instance.owner[held[own:]])
        assert (plan.weight_from[rank, own : len(held)] != rank).all()
        assert chosen.max_borrowed is None or len(held) - own <= chosen.max_borrowed
    borrowed = plan.weight_from.reshape(-1) >= 0
    assert (plan.flow.sum(0)[borrowed] > 0).all(), "a weight is sent for no row"
    named = np.sort(np.concatenate(plan.order))
    np.testing.assert_array_equal(named, np.flatnonzero(plan.slots.reshape(-1) >= 0))


@LAWS
@given(instances(), st.sampled_from(ALPHAS), st.sampled_from(["prose", "pseudocode"]), st.integers(1, 64))
def test_cap_and_transfers_are_bounded_with_pieces_of_any_size(instance, alpha, rule, per_node):
    chosen = LeastLoadedOptions(alpha=alpha, lambda_=None, min_rows=1, small_remainder=rule)
    chosen = with_nodes(chosen, len(instance.table), per_node)
    plan = plan_least_loaded(instance.counts, instance.table, chosen)
    ranks = len(instance.table)
    cap = share_of_rank(int(instance.counts.sum()), ranks, chosen)
    transfers = int((plan.weight_from >= 0).sum())
    spilled = sum(len(order) > 1 for order in plan.order)
    assert plan.rows_per_rank().max() <= cap
    assert transfers <= max(0, spilled + ranks - 1)
    if native(instance).max() <= cap:
        assert transfers == 0
    if alpha == 1:
        assert plan.rows_per_rank().max() == -(-int(instance.counts.sum()) // ranks)


@LAWS
@given(instances(), options())
def test_no_helper_exceeds_the_cap_and_no_rank_does_worse_than_static(instance, chosen):
    chosen = replace(chosen, small_remainder="prose", lambda_=None)
    plan = plan_least_loaded(instance.counts, instance.table, chosen)
    cap = share_of_rank(int(instance.counts.sum()), len(instance.table), chosen)
    over = plan.rows_per_rank() > cap
    assert (plan.rows_per_rank()[over] <= native(instance)[over]).all()


@LAWS
@given(instances(), options(), st.integers(1, 8))
def test_source_first_moves_no_more_rows_and_changes_nothing_else(instance, chosen, per_node):
    chosen = with_nodes(chosen, len(instance.table), per_node)
    published = plan_least_loaded(instance.counts, instance.table, replace(chosen, spill_order="global"))
    local = plan_least_loaded(instance.counts, instance.table, replace(chosen, spill_order="source_first"))
    for field in ("slots", "weight_from", "round"):
        np.testing.assert_array_equal(getattr(local, field), getattr(published, field))
    np.testing.assert_array_equal(local.flow.sum(0), published.flow.sum(0))
    staying = [np.trace(plan.send_matrix()) for plan in (published, local)]
    assert staying[1] >= staying[0]
    node = np.arange(len(instance.table)) // per_node
    inside = [int(plan.send_matrix()[node[:, None] == node].sum()) for plan in (published, local)]
    assert inside[1] >= inside[0]
    for e, order in enumerate(local.order):
        rank = order // local.slots_per_rank
        most = np.minimum(instance.counts[rank, e], local.flow[:, order].sum(0))
        np.testing.assert_array_equal(local.flow[rank, order], most)
        demand = np.bincount(node[rank], local.flow[:, order].sum(0), node.max() + 1)
        supply = np.bincount(node, instance.counts[:, e], node.max() + 1)
        here = local.flow[:, order] * (node[:, None] == node[rank])
        np.testing.assert_array_equal(np.bincount(node, here.sum(1), node.max() + 1), np.minimum(supply, demand))


@LAWS
@given(instances(), options())
def test_every_rank_makes_the_same_bytes(instance, chosen):
    first = plan_least_loaded(instance.counts, instance.table, chosen)
    again = plan_least_loaded(instance.counts.copy(order="F"), np.array(instance.table), replace(chosen))
    assert as_bytes(first) == as_bytes(again)


@LAWS
@given(instances(), options(), st.integers(0, 6))
def test_fixed_slots_are_never_exceeded(instance, chosen, extra):
    width = instance.table.shape[1] + extra
    plan = plan_least_loaded_sharded(instance.counts, instance.table, width, chosen)
    plan.check(instance.counts)
    assert plan.slots_per_rank == width
    for slots in plan.slots:
        held = slots[slots >= 0]
        assert len(set(held.tolist())) == len(held)
    if extra == 0 and (instance.table >= 0).all():
        np.testing.assert_array_equal(plan.flow, plan_static(instance.counts, instance.table).flow)
