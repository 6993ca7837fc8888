"""Eight ranks in pairs and quads: every depth of a hierarchical exchange, under every planner, with swaps between steps
and tensor ranks, equals the dense oracle: outputs, gradients, AdamW's parameters."""

from __future__ import annotations

from typing import Any

import pytest
from twinmoe.backends import reference
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.config import ClusterConfig, LevelConfig, MoeConfig, ParallelConfig
from twinmoe.moe_core.exactness import Case, check_case
from twinmoe.moe_core.mesh import Mesh

RANKS = 8
CLUSTER = ClusterConfig(
    name="pairs_and_quads",
    levels=(LevelConfig(name="pair", size=2), LevelConfig(name="quad", size=4), LevelConfig(name="host")),
)
MOE = MoeConfig(num_experts=11, top_k=4, expert_hidden_size=6, aux_loss_coeff=0.02)
EAGER: dict[str, Any] = {"least_loaded": {"min_rows": 1, "imbalance_threshold": None}}
MOVING: dict[str, Any] = {"slots_per_rank": 4, "relayout": {"skip_below": 0, "hysteresis": 0, "window": 2}}
PLANNERS: dict[str, dict[str, Any]] = {
    "static": {},
    "swap": {"placement": "swap"},
    "least_loaded": {"planner": "least_loaded", "residency": "borrowed", **EAGER},
    "least_loaded_swap": {"planner": "least_loaded", "residency": "borrowed", "placement": "swap", **EAGER},
    "relayout": {"planner": "relayout", "residency": "fully_sharded", **MOVING},
}


def worst(case: Case, depth: int) -> float:
    """Largest error on any rank; AssertionError where a structural zero is not one or the depth is another."""

    def rank(comm: Communicator) -> float:
        mesh = Mesh.over(RANKS, case.expert, 1, case.tensor)
        runtime = make_runtime(reference.ops, comm, mesh, case.parallel, CLUSTER)
        assert runtime.topology is not None
        assert runtime.topology.depth >= depth
        report = check_case(case, reference, runtime)
        assert report.zeros_ok, report.where
        return report.worst

    return max(run_ranks(RANKS, rank))


def how(planner: str, depth: int, deduplicate: bool, **more: Any) -> ParallelConfig:
    settings = {"transport": "hierarchical_dedup", "hierarchy_depth": depth, "deduplicate": deduplicate}
    return ParallelConfig.model_validate({**settings, **PLANNERS[planner], **more})


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_depth_under_every_planner(planner: str, depth: int):
    for deduplicate, routing in ((True, "idle_rank"), (False, "random")):
        case = Case(MOE, how(planner, depth, deduplicate), expert=RANKS, routing=routing)
        assert worst(case, depth) <= 1e-10, case.name


@pytest.mark.parametrize("planner", ["swap", "least_loaded"])
@pytest.mark.parametrize("depth", [1, 2])
def test_tensor_ranks_inside_the_units(planner: str, depth: int):
    case = Case(MOE, how(planner, depth, True), expert=4, tensor=2, routing="uneven")
    assert worst(case, depth) <= 1e-10, case.name


def test_two_expert_groups_of_four():
    case = Case(MOE, how("swap", 2, True), expert=4, routing="same_experts")
    assert worst(case, 2) <= 1e-10


@pytest.mark.parametrize("placement", ["fixed", "swap"])
@pytest.mark.parametrize(("expert", "tensor"), [(4, 2), (2, 4), (2, 2)])
def test_groupwise_with_experts_that_swap(expert: int, tensor: int, placement: str):
    moe = MOE.model_copy(update={"expert_hidden_size": 8})
    parallel = ParallelConfig(transport="groupwise", placement=placement)  # type: ignore[arg-type]
    assert worst(Case(moe, parallel, expert=expert, tensor=tensor, routing="idle_rank"), 1) <= 1e-10
