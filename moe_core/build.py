"""From a config to the collaborators of an MoE layer: the one place where names become objects."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..backends.protocol import Array, Communicator, Group, Ops, Parameter
from .config import ClusterConfig, MoeConfig, ParallelConfig
from .heads import HeadsLayer
from .heads_build import build_heads
from .layer import MoELayer
from .mesh import Mesh
from .planners.budget import RoundRule
from .planners.static import owners
from .planning import Planner, cost_model, layer_shape, make_planner
from .residency.base import Residency
from .residency.borrowed import Borrowed
from .residency.fully_sharded import FullySharded
from .residency.owned import Owned
from .routing import Router, RouterContext, make_router
from .tensor_parallel import (
    SplitExperts,
    SummedOverTensor,
    part_of_experts,
    split_mlp,
    summed_over_tensor,
)
from .topology import Topology, flat_topology, topology_of
from .transformer import Declare, mlp, mlp_parameters
from .transport.base import Transport
from .transport.depth import usual_depth
from .transport.flat import Flat, Local
from .transport.groupwise import Groupwise
from .transport.hierarchical import HierarchicalDedup, Hierarchy, StageGroups, hierarchy_groups
from .whole import Whole, whole_layer

_FORECAST_BYTES = 4
"""Of an element, where a layer is sized before its dtype is known: rows as float32."""


@dataclass(frozen=True)
class Runtime:
    """Where a layer runs: operations, collectives, and this rank's groups by name.

    topology: of an expert group. stage_groups: those of hierarchical exchanges, where they are used. searches: the
    thread beside the step in which planners look for layouts. device_teraflops: as the cluster's file says.
    """

    ops: Ops
    comm: Communicator
    mesh: Mesh
    groups: Mapping[str, Group]
    topology: Topology | None = None
    stage_groups: StageGroups = field(default_factory=dict)
    searches: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "layouts"))
    device_teraflops: float | None = None


GROUPS: Mapping[str, tuple[str, ...]] = {
    "world": ("data", "head", "expert", "tensor"),
    "expert": ("expert",),
    "expert_weights": ("expert",),
    "expert_data": ("data",),
    "tensor": ("tensor",),
    "token": ("data", "head", "expert"),
    "expert_tensor": ("expert", "tensor"),
    "head": ("head",),
    "head_expert": ("head", "expert"),
    "head_data": ("data", "expert", "tensor"),
}
"""Group name -> mesh axes along which its ranks differ."""


NOMINAL_TOKENS = 4096
"""Tokens per rank for which a hierarchy's usual depth is chosen before any is seen."""


def make_runtime(
    ops: Ops,
    comm: Communicator,
    mesh: Mesh,
    parallel: ParallelConfig | None = None,
    cluster: ClusterConfig | None = None,
) -> Runtime:
    """All groups of the mesh, and those of hierarchical exchanges over `cluster`. Collective."""
    groups = {name: comm.group(name, mesh.partition(*axes)) for name, axes in GROUPS.items()}
    topology = topology_of(cluster or ClusterConfig(), mesh.partition("expert"))
    hierarchical = parallel is not None and parallel.transport == "hierarchical_dedup"
    stage_groups = hierarchy_groups(comm, mesh, topology) if hierarchical else {}
    teraflops = None if cluster is None else cluster.device_teraflops
    return Runtime(ops, comm, mesh, groups, topology, stage_groups, device_teraflops=teraflops)


@dataclass(frozen=True)
class LayerParts:
    """A layer and the parameters that it reads by their short names."""

    layer: MoELayer | HeadsLayer
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class LayerSpec:
    """What distinguishes one layer from another: names, seeds, scales of first values. router: one made already."""

    width: int
    prefix: str
    seed: int = 0
    std: float = 0.02
    std_down: float = 0.02
    checkpoint_experts: bool = False
    layer: int = 0
    vocab_size: int | None = None
    router: Router | None = None


def build_layer(moe: MoeConfig, parallel: ParallelConfig, runtime: Runtime, spec: LayerSpec) -> LayerParts:
    """Router, planner, transport and residency of one layer on this rank (`moe.num_heads > 1`: of its heads)."""
    ops, group = runtime.ops, runtime.groups["expert"]
    if moe.num_heads > 1:
        return build_heads(moe, parallel, runtime, spec, build_layer, _shared_experts(runtime, moe, spec))
    if moe.num_experts < group.size:
        raise ValueError(
            f"expert_parallel_size={group.size} exceeds moe.num_experts={moe.num_experts}; "
            "choose at most one rank per expert"
        )
    place = (spec.layer, spec.vocab_size, runtime.comm, runtime.groups["world"])
    router = spec.router or make_router(RouterContext(ops, moe, spec.width, spec.seed, spec.std, *place))
    residency = _residency(moe, parallel, runtime, spec)
    shared, shared_parameters = _shared_experts(runtime, moe, spec)
    layer = MoELayer(
        ops=ops,
        comm=runtime.comm,
        group=group,
        num_experts=moe.num_experts,
        router=router,
        planner=_planner(moe, parallel, runtime, spec),
        transport=_transport(moe, parallel, runtime, spec.width),
        residency=residency,
        shared=shared,
        checkpoint_experts=spec.checkpoint_experts,
        rounds=_rounds(moe, parallel, runtime, spec),
        whole=_whole(moe, parallel, runtime, spec),
    )
    parameters = router.parameters(spec.prefix) + residency.parameters(spec.prefix, spec.std_down) + shared_parameters
    return LayerParts(layer, parameters)


def _whole(moe: MoeConfig, parallel: ParallelConfig, runtime: Runtime, spec: LayerSpec) -> Whole | None:
    ranks = runtime.groups["expert"].size * runtime.groups["tensor"].size
    return None if spec.checkpoint_experts else whole_layer(moe, parallel, runtime.ops, ranks)


def _nodes(runtime: Runtime) -> tuple[int, ...] | None:
    """Node of each expert rank: the units just inside the whole group (None: one node)."""
    topology = runtime.topology
    return tuple(topology.unit_of(1).tolist()) if topology is not None and topology.depth > 1 else None


def _residency(moe: MoeConfig, parallel: ParallelConfig, runtime: Runtime, spec: LayerSpec) -> Residency:
    tensor = runtime.groups["tensor"]
    if tensor.size == 1:
        return _whole_experts(moe, parallel, runtime, spec)
    parts = part_of_experts(moe, tensor)
    inner = _whole_experts(parts, parallel, runtime, spec)
    return SplitExperts(_whole_experts(moe, parallel, runtime, spec), inner, tensor, moe.activation)


def _whole_experts(moe: MoeConfig, parallel: ParallelConfig, runtime: Runtime, spec: LayerSpec) -> Residency:
    ops, comm, weights = runtime.ops, runtime.comm, runtime.groups["expert_weights"]
    if parallel.residency == "fully_sharded":
        return FullySharded(ops, comm, weights, moe, spec.width, spec.seed, spec.std)
    mine = np.flatnonzero(owners(moe.num_experts, weights.size) == weights.index)
    owned = Owned(ops, moe, spec.width, mine, spec.seed, spec.std)
    return Borrowed(owned, ops, comm, weights, moe, spec.width) if parallel.residency == "borrowed" else owned


def _transport(moe: MoeConfig, parallel: ParallelConfig, runtime: Runtime, width: int) -> Transport:
    ops, comm, group, tensor = runtime.ops, runtime.comm, runtime.groups["expert"], runtime.groups["tensor"]
    if group.size > 1 and tensor.size > 1 and parallel.transport == "groupwise":
        return Groupwise(ops, comm, group, tensor)
    if group.size == 1 and parallel.max_rows_per_rank is None:
        whole: Transport = Local(ops, moe.num_experts)
    elif parallel.transport == "hierarchical_dedup":
        whole = HierarchicalDedup(ops, comm, group, _hierarchy(moe, parallel, runtime, width))
    else:
        whole = Flat(ops, comm, group)
    return whole if tensor.size == 1 else SummedOverTensor(whole, ops, comm, tensor)


def _planner(moe: MoeConfig, parallel: ParallelConfig, runtime: Runtime, spec: LayerSpec) -> Planner:
    ranks = runtime.groups["expert"].size
    topology = runtime.topology or flat_topology(ranks)
    cost = cost_model(
        topology, layer_shape(moe, spec.width, _FORECAST_BYTES), runtime.device_teraflops, spec.checkpoint_experts
    )
    return make_planner(moe, parallel, ranks, _nodes(runtime), runtime.searches, cost)


def _rounds(moe: MoeConfig, parallel: ParallelConfig, runtime: Runtime, spec: LayerSpec) -> RoundRule:
    """ValueError where exchanges should run under compute and can't."""
    if parallel.overlap_chunks > 1 and runtime.comm.no_overlap is not None:
        raise ValueError(
            f"parallel.overlap_chunks={parallel.overlap_chunks}: exchanges don't run under compute on this backend "
            f"({runtime.comm.no_overlap}); set overlap_chunks=1"
        )
    if parallel.prefetch_layers and runtime.comm.no_overlap is not None:
        raise ValueError(
            f"parallel.prefetch_layers={parallel.prefetch_layers}: weights don't travel under compute on this backend "
            f"({runtime.comm.no_overlap}); set prefetch_layers=0"
        )
    shape = layer_shape(moe, spec.width, _FORECAST_BYTES)
    return RoundRule(parallel.max_rows_per_rank, parallel.over_budget, parallel.overlap_chunks, shape)


def _hierarchy(moe: MoeConfig, parallel: ParallelConfig, runtime: Runtime, width: int) -> Hierarchy:
    """Fixed depth as far as the topology goes; 'auto' starts from the modelled best, or the deepest where nothing
    was measured."""
    topology = runtime.topology or flat_topology(runtime.groups["expert"].size)
    depth = None if parallel.hierarchy_depth == "auto" else min(parallel.hierarchy_depth, topology.depth)
    usual = topology.depth
    if any(level.within.beta or level.rails.beta for level in topology.levels):
        usual = usual_depth(topology, moe.num_experts, moe.top_k, NOMINAL_TOKENS, 4 * width)
    return Hierarchy(topology, runtime.stage_groups, depth, usual, parallel.deduplicate)


def _shared_experts(runtime: Runtime, moe: MoeConfig, spec: LayerSpec):
    """The dense expert that every token visits (optionally scaled by a sigmoid gate), and its parameters."""
    if not moe.num_shared_experts:
        return None, ()
    ops, tensor = runtime.ops, runtime.groups["tensor"]
    hidden = moe.num_shared_experts * (moe.shared_expert_hidden_size or moe.expert_hidden_size)
    declare = Declare(spec.prefix, spec.seed)
    made = mlp_parameters("w_shared", spec.width, hidden, moe.activation, (spec.std, spec.std_down), declare)
    made = split_mlp(made, tensor, moe.activation)
    if moe.shared_expert_gate:
        made.append(declare("w_shared_gate", (spec.width, 1), spec.std))

    def shared(params: Mapping[str, Array], x_TD: Array) -> Array:
        part_TD = mlp(ops, moe.activation, params["w_shared_up"], params["w_shared_down"], x_TD)
        y_TD = summed_over_tensor(runtime.comm, tensor, part_TD)
        return y_TD * ops.sigmoid(x_TD @ params["w_shared_gate"]) if moe.shared_expert_gate else y_TD

    return shared, tuple(made)
