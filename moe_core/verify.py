"""`twinmoe verify`: every way of running a layer against the oracle, on this machine's ranks.

quick: each named scheme once. standard: each scheme with each kind of routing, and a cover in which every two
options of different axes meet. full: the product.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..backends.protocol import Communicator, Launch
from ..backends.registry import Backend
from .bits import digests_of_all
from .build import Runtime, make_runtime
from .combinations import ConfigError, check_combinations
from .config import ClusterConfig, Config, LevelConfig, MoeConfig, ParallelConfig
from .exactness import ROUTINGS, Case, Report, check_case
from .mesh import Mesh

VerifyLevel = Literal["quick", "standard", "full"]
TOLERANCE: Mapping[str, float] = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 3e-2}

_EAGER: dict[str, Any] = {"least_loaded": {"min_rows": 1, "imbalance_threshold": None}}
_MOVING: dict[str, Any] = {"slots_per_rank": 4, "relayout": {"skip_below": 0, "hysteresis": 0, "window": 2}}

SCHEMES: Mapping[str, dict[str, Any]] = {
    "ep": {},
    "fsdp_ep": {"residency": "fully_sharded"},
    "llep": {"planner": "least_loaded", "residency": "borrowed", **_EAGER},
    "llep_source_first": {
        "planner": "least_loaded",
        "residency": "borrowed",
        "least_loaded": {**_EAGER["least_loaded"], "spill_order": "source_first"},
    },
    "llep_sharded": {"planner": "least_loaded", "residency": "fully_sharded", **_EAGER, "slots_per_rank": 4},
    "laer": {"planner": "relayout", "residency": "fully_sharded", **_MOVING},
    "laer_borrowed": {"planner": "relayout", "residency": "borrowed", **_MOVING},
    "hiermoe": {"transport": "hierarchical_dedup", "placement": "swap"},
}
"""How experts are planned and kept; the transport is an axis of its own."""

MOES: Mapping[str, dict[str, Any]] = {
    "top2": {"num_experts": 8, "top_k": 2, "z_loss_coeff": 0.01},
    "uneven_shared": {
        "num_experts": 5,
        "top_k": 2,
        "num_shared_experts": 1,
        "shared_expert_gate": True,
        "activation": "gelu",
    },
    "all_experts": {"num_experts": 4, "top_k": 4, "softmax_order": "after_topk"},
    "sigmoid": {"num_experts": 6, "top_k": 3, "score_function": "sigmoid", "route_scale": 2.5},
    "switch": {"num_experts": 8, "top_k": 1, "router": "switch", "norm_topk_prob": False},
    "heads": {"num_experts": 4, "top_k": 2, "num_heads": 4, "head_dim": 3, "activation": "gelu"},
}

TRANSPORTS: Mapping[str, dict[str, Any]] = {
    "flat": {},
    "hierarchical_dedup": {"transport": "hierarchical_dedup"},
    "hierarchical": {"transport": "hierarchical_dedup", "deduplicate": False},
    "groupwise": {"transport": "groupwise"},
}
TENSOR_SIZES = (1, 2)

ROUNDS: Mapping[str, dict[str, Any]] = {
    "whole": {},
    "budget": {"max_rows_per_rank": 5},
    "overlap": {"overlap_chunks": 3},
}
"""How often rows travel: at once, in rounds of a few rows, in rounds whose exchanges run under compute."""
WORK = (("whole", False, 1), ("whole", True, 2), ("budget", False, 2), ("overlap", True, 1))
"""(rounds, recompute, micro-batches)."""

SKEWED = ("same_experts", "idle_rank")
"""Routings for rounds: some ranks and rounds have no rows."""
UNEQUAL = ("idle_rank", "uneven")
"""Routings in which ranks hold different numbers of tokens: the exchange of heads has equal splits."""


@dataclass(frozen=True)
class Labelled:
    """A case and the value it has on each axis."""

    case: Case
    axes: tuple[tuple[str, str], ...]


def all_cases(world: int, dtype: str) -> Iterator[Labelled]:
    """Every legal case of `world` ranks."""
    sizes = range(1, world + 1)
    meshes = [(e, h, t) for t in TENSOR_SIZES for h in sizes for e in sizes if world % (e * h * t) == 0]
    for moe, scheme, transport, routing, mesh, work in itertools.product(
        MOES, SCHEMES, TRANSPORTS, ROUTINGS, meshes, WORK
    ):
        if mesh[1] > 1 and routing in UNEQUAL:
            continue
        if work[0] != "whole" and routing not in SKEWED:
            continue
        labelled = make_case(moe, scheme, transport, routing, mesh, dtype, *work)
        if labelled is not None and mesh[0] <= labelled.case.moe.num_experts:
            yield labelled


def make_case(
    moe: str,
    scheme: str,
    transport: str,
    routing: str,
    sizes: tuple[int, int, int],
    dtype: str,
    rounds: str = "whole",
    recompute: bool = False,
    micro: int = 1,
) -> Labelled | None:
    """None where options do not combine, or would name a case that another name has. sizes: expert, head, tensor."""
    expert, head, tensor = sizes
    sized = {"head_parallel_size": head, "tensor_parallel_size": tensor}
    how = {**SCHEMES[scheme], **TRANSPORTS[transport], **sized, **ROUNDS[rounds]}
    if rounds == "overlap" and expert == 1:
        return None
    if scheme == "hiermoe" and transport != "hierarchical_dedup":
        return None
    config = MoeConfig(**{"expert_hidden_size": 6, "aux_loss_coeff": 0.02, **MOES[moe]})
    parallel = ParallelConfig.model_validate({"scheme": scheme, **how})
    try:
        check_combinations(Config(moe=config, parallel=parallel))
    except ConfigError:
        return None
    case = Case(config, parallel, expert, head, tensor, routing, recompute=recompute, micro_batches=micro)
    one_step = {"optimizer": "sgd", "steps": 1} if dtype == "bfloat16" else {}
    case = replace(case, dtype=dtype, **one_step)  # type: ignore[arg-type]
    axes = {
        "router": config.router,
        "moe": moe,
        "planner": parallel.planner,
        "placement": parallel.placement,
        "transport": transport,
        "residency": parallel.residency,
        "heads": str(config.num_heads),
        "scheme": scheme,
        "routing": routing,
        "expert_parallel_size": str(expert),
        "head_parallel_size": str(head),
        "tensor_parallel_size": str(tensor),
        "recompute": "experts" if recompute else "none",
        "rounds": rounds,
    }
    return Labelled(case, tuple(axes.items()))


def choose_cases(level: VerifyLevel, world: int, dtype: str, overlaps: bool = True) -> list[Labelled]:
    """The cases of a level: deterministic, the same on every rank. overlaps: False leaves those out."""
    everything = [c for c in all_cases(world, dtype) if overlaps or dict(c.axes)["rounds"] != "overlap"]
    if level == "full":
        return everything
    named = [c for c in everything if _is_named(c, world)]
    if level == "quick":
        return [c for c in named if dict(c.axes)["routing"] in ("random", "idle_rank")]
    return named + pairwise_cover(everything, {a for c in named for a in itertools.combinations(c.axes, 2)})


def _is_named(labelled: Labelled, world: int) -> bool:
    """A scheme in its own transport, all ranks sharing the experts, the plain top-2 layer."""
    axes, case = dict(labelled.axes), labelled.case
    own = "hierarchical_dedup" if axes["scheme"] == "hiermoe" else "flat"
    return (
        axes["moe"] == "top2"
        and axes["transport"] == own
        and case.expert == min(world, case.moe.num_experts)
        and not case.recompute
        and axes["rounds"] == "whole"
    )


def pairwise_cover(candidates: Sequence[Labelled], covered: set[tuple[Any, ...]]) -> list[Labelled]:
    """Few cases in which every pair of values of two axes that can meet does meet."""
    order = np.random.default_rng(0).permutation(len(candidates))
    pairs = {int(i): set(itertools.combinations(candidates[i].axes, 2)) for i in order}
    missing = set().union(*pairs.values()) - covered if pairs else set()
    chosen: list[Labelled] = []
    for least in (24, 12, 6, 3, 1):  # first the cases that cover most
        for i in order:
            gain = pairs[int(i)] & missing
            if len(gain) >= least:
                chosen.append(candidates[i])
                missing -= gain
    return chosen


def nominal_cluster(ranks: int, tensor: int = 1) -> ClusterConfig:
    """Pairs of an expert group's ranks as nodes, so that hierarchical exchanges have levels to use."""
    if ranks < 4:
        return ClusterConfig()
    return ClusterConfig(name="pairs", levels=(LevelConfig(name="node", size=2 * tensor), LevelConfig(name="host")))


class Runtimes:
    """One runtime per mesh and kind of transport: groups are made once."""

    def __init__(self, backend: Any, comm: Communicator) -> None:
        self._backend, self._comm = backend, comm
        self._made: dict[tuple[int, int, int, bool], Runtime] = {}

    def of(self, case: Case) -> Runtime:
        hierarchical = case.parallel.transport == "hierarchical_dedup"
        key = (case.expert, case.head, case.tensor, hierarchical)
        if key not in self._made:
            mesh = Mesh.over(self._comm.size, case.expert, case.head, case.tensor)
            cluster = nominal_cluster(case.expert, case.tensor)
            self._made[key] = make_runtime(self._backend.ops, self._comm, mesh, case.parallel, cluster)
        return self._made[key]


def verify_rank(backend: Backend | Any, comm: Communicator, level: VerifyLevel, dtype: str) -> dict[str, Any]:
    """All cases of this world on this rank; the worst over ranks is reported on every rank.

    bits: (case, digest of everything that all ranks computed) in the order of the cases.
    """
    runtimes = Runtimes(backend, comm)
    cases = choose_cases(level, comm.size, dtype, comm.no_overlap is None)
    reports = [check_case(labelled.case, backend, runtimes.of(labelled.case)) for labelled in cases]
    world = make_runtime(backend.ops, comm, Mesh.over(comm.size, comm.size)).groups["world"]
    mine = np.array([[r.worst, float(r.zeros_ok)] for r in reports]).reshape(-1, 2)
    everyone = comm.gather_to_host(mine, world)
    worst, zeros_ok = everyone[:, :, 0].max(0), everyone[:, :, 1].min(0) > 0
    digests = digests_of_all([r.digest for r in reports], comm, world)
    bits = [[r.case.name, digest] for r, digest in zip(reports, digests)]
    return {**_summary(cases, reports, worst, zeros_ok, comm.size, dtype), "bits": bits}


def _summary(
    cases: Sequence[Labelled],
    reports: Sequence[Report],
    worst: np.ndarray,
    zeros_ok: np.ndarray,
    world: int,
    dtype: str,
) -> dict[str, Any]:
    good = (worst <= TOLERANCE[dtype]) & zeros_ok
    axes: dict[str, Counter[str]] = {}
    for labelled in cases:
        for axis, value in labelled.axes:
            axes.setdefault(axis, Counter())[value] += 1
    failures = [
        {"case": report.case.name, "error": float(w), "where": report.where, "world": world}
        for report, w, ok in zip(reports, worst, good)
        if not ok
    ]
    return {
        "cases": len(cases),
        "passed": int(good.sum()),
        "failed": len(failures),
        "failures": failures,
        "worst_relative_error": float(worst.max(initial=0.0)),
        "axes": {axis: dict(values) for axis, values in axes.items()},
        "world_sizes": [world],
    }


def merge(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results of several worlds or backends as one."""
    axes: dict[str, Counter[str]] = {}
    for part in parts:
        for axis, values in part["axes"].items():
            axes.setdefault(axis, Counter()).update(values)
    return {
        "cases": sum(p["cases"] for p in parts),
        "passed": sum(p["passed"] for p in parts),
        "failed": sum(p["failed"] for p in parts),
        "failures": [f for p in parts for f in p["failures"]],
        "worst_relative_error": max((p["worst_relative_error"] for p in parts), default=0.0),
        "world_sizes": sorted({w for p in parts for w in p["world_sizes"]}),
        "axes": {axis: dict(values) for axis, values in axes.items()},
    }


def run(backend: Backend, launch: Launch, level: VerifyLevel = "standard", dtype: str = "float64") -> dict[str, Any]:
    """One rank of `twinmoe verify` in a world of `launch.size`."""
    comm = backend.comm.connect(launch)
    result = verify_rank(backend, comm, level, dtype)
    comm.close()
    return {**result, "backends": [backend.name]}
