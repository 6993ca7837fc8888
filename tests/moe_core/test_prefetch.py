"""Weights fetched one layer ahead: the same bits, the same calls on every rank, an order that hides the exchange."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends import reference
from twinmoe.backends.protocol import Launch, TrainOptions
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.combinations import ConfigError, check_combinations
from twinmoe.moe_core.config import Config, ParallelConfig
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.model import build_model
from twinmoe.moe_core.planning import Stateless
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.exactness.ahead import LAER, WAYS, batch_of, config_of, differing, train
from twinmoe.testing.processes import run_processes

TARGET = "twinmoe.testing.exactness.ahead"


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_training_is_bit_for_bit_that_without(way: str, ranks: int) -> None:
    """Accumulation, an evaluation and a step that is left out among the steps."""
    plain, ahead = (run_ranks(ranks, lambda comm, n=n: train(reference, comm, config_of(WAYS[way], n))) for n in (0, 1))
    assert [differing(a, b) for a, b in zip(plain, ahead, strict=True)] == [[]] * ranks
    if ranks > 1 and way != "fsdp_ep":
        assert ahead[0].changed >= 3, "layouts move, so weights of an old one would show"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "ways"),
    [
        (2, ["laer", "in rounds"]),
        pytest.param(2, ["fsdp_ep", "overlap"], marks=pytest.mark.slow),
        pytest.param(4, ["laer", "fsdp_ep"], marks=pytest.mark.slow),
    ],
)
def test_real_ranks_issue_the_same_calls_in_the_same_order_and_compute_the_same_bits(
    ranks: int, ways: list[str]
) -> None:
    for way, found in run_processes(ranks, f"{TARGET}:process", {"ways": ways, "dtype": "float32"}, "cpu").items():
        assert (found["differs"], found["worst"], found["alike"]) == ([], 0, True), way
        assert sorted(map(tuple, found["plain"])) == sorted(map(tuple, found["ahead"])), "the same calls, moved"
        for calls in (found["plain"], found["ahead"]):
            assert in_flight(calls)[-1] == 0, "no exchange of weights or gradients is left pending"
        if way in ("laer", "fsdp_ep"):
            assert max(in_flight(found["plain"])) == 1
            assert max(in_flight(found["ahead"])) == 2
            assert order_of(found["ahead"])[:27] == AHEAD


def in_flight(calls: list[list[str]]) -> list[int]:
    """Exchanges of weights or their gradients under way after each call; that of rows is left out."""
    steps = [
        (name.endswith("begun")) - (name.endswith("awaited")) for name, group, _ in calls if group.endswith("weights")
    ]
    return np.cumsum(steps).tolist()


def order_of(calls: list[list[str]]) -> str:
    """u, r: an unshard, a reshard sets out; U, R: it is waited for; x: rows travel; p: counts for a plan."""
    told = []
    for name, _, place in calls:
        letter = {"gather_to_host": "p", "all_to_all": "x"}.get(name, "r" if "backward" in place else "u")
        told.append(letter.upper() if name.endswith("awaited") else letter)
    return "".join(told)


AHEAD = "puxuUx" + "pxuUx" + "pxUx" + "xrx" + "xrRx" + "xrRxR"
"""Three MoE layers: from the second on an unshard sets out after the rows of the layer before, a reshard is waited for
after the next layer's own has set out; the last is waited for at the end."""


@pytest.mark.slow
@pytest.mark.processes
def test_a_reshard_that_nobody_waits_for_is_caught() -> None:
    found = run_processes(2, f"{TARGET}:process", {"ways": ["laer"], "dtype": "float64", "fault": True}, "cpu")["laer"]
    assert any(name.startswith("gradient 0 layers.2.moe.w_") for name in found["differs"])
    assert in_flight(found["ahead"])[-1] > 0 == in_flight(found["plain"])[-1]


@pytest.mark.processes
def test_a_plan_over_its_budget_leaves_nothing_pending_and_the_communicator_goes_on() -> None:
    found = run_processes(2, f"{TARGET}:process_over_budget", {}, "cpu")
    assert found["raised"]
    assert found["names"].count("all_to_all, begun") == found["names"].count("all_to_all, awaited") == 2
    assert found["differs"] == []


def test_a_planner_that_announces_other_slots_than_it_plans_is_caught() -> None:
    def body(comm: Communicator) -> None:
        config = config_of(LAER, 1)
        runtime = make_runtime(reference.ops, comm, Mesh.over(comm.size, comm.size), config.parallel)
        model = build_model(config, runtime)
        second: Any = model.layers[2]
        slots_RC = second.planner.coming()[::-1]
        object.__setattr__(second, "planner", Stateless(lambda c, p=second.planner: p.plan(c, True), slots_RC))
        state = reference.trainer.build(model.components, TrainOptions(dtype="float64"), runtime.groups, comm)
        model.loss(state.modules, batch_of(comm.rank, comm.size, 0))

    with pytest.raises(RuntimeError, match=r"set parallel\.prefetch_layers=0 and"):
        run_ranks(2, body)


@pytest.mark.parametrize(
    ("sections", "remedy"),
    [
        ({"parallel": {"prefetch_layers": 1}}, "choose residency fully_sharded, or prefetch_layers 0"),
        ({"parallel": {**LAER, "planner": "least_loaded", "prefetch_layers": 1}}, "planner relayout or static"),
        ({"parallel": {**LAER, "prefetch_layers": 1}, "train": {"recompute": "experts"}}, "choose recompute none"),
        ({"parallel": {**LAER, "prefetch_layers": 1}, "train": {"recompute": "layer"}}, "choose recompute none"),
        ({"parallel": {**LAER, "prefetch_layers": 1, "data_sharding": "full"}}, "choose data_sharding none"),
        ({"parallel": {**LAER, "prefetch_layers": 1}, "moe": {"num_heads": 2, "head_dim": 4}}, "choose num_heads 1"),
    ],
)
def test_what_has_no_layer_to_fetch_ahead_is_refused_with_the_remedy(sections: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        check_combinations(Config.model_validate(sections))


def test_a_backend_whose_exchanges_cannot_overlap_refuses_by_name() -> None:
    home = load_or_skip("mindspore-cpu")
    config = ParallelConfig.model_validate({**LAER, "prefetch_layers": 1})
    runtime = make_runtime(home.ops, home.comm.connect(Launch()), Mesh(), config)
    with pytest.raises(ValueError, match=r"prefetch_layers=1: .* MindSpore's functional differentiation\); set"):
        build_layer(config_of(LAER, 1).moe, config, runtime, LayerSpec(8, ""))
