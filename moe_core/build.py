"""From a config to the collaborators of an MoE layer: the one place where names become objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..backends.protocol import Array, Communicator, Group, Ops, Parameter
from .config import MoeConfig, ParallelConfig
from .layer import MoELayer, Planner
from .mesh import Mesh
from .planners.static import owners, plan_static, slot_table
from .residency.owned import Owned
from .routing import make_router
from .transformer import Declare, mlp, mlp_parameters
from .transport.base import Transport
from .transport.flat import Flat, Local


@dataclass(frozen=True)
class Runtime:
    """Where a layer runs: operations, collectives, and this rank's groups by name."""

    ops: Ops
    comm: Communicator
    mesh: Mesh
    groups: Mapping[str, Group]


GROUPS: Mapping[str, tuple[str, ...]] = {
    "world": ("data", "head", "expert", "tensor"),
    "expert": ("expert",),
    "expert_data": ("data",),
    "tensor": ("tensor",),
    "head": ("head",),
}
"""Group name -> mesh axes along which its ranks differ."""


def make_runtime(ops: Ops, comm: Communicator, mesh: Mesh) -> Runtime:
    """All groups of the mesh; every rank calls it at the same time."""
    return Runtime(ops, comm, mesh, {name: comm.group(name, mesh.partition(*axes)) for name, axes in GROUPS.items()})


@dataclass(frozen=True)
class LayerParts:
    """A layer and the parameters that it reads by their short names."""

    layer: MoELayer
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class LayerSpec:
    """What distinguishes one layer from another: names, seeds, scales of the first values."""

    width: int
    prefix: str
    seed: int = 0
    std: float = 0.02
    std_down: float = 0.02
    checkpoint_experts: bool = False


def build_layer(moe: MoeConfig, parallel: ParallelConfig, runtime: Runtime, spec: LayerSpec) -> LayerParts:
    """Router, planner, transport and residency of one layer on this rank."""
    ops, group = runtime.ops, runtime.groups["expert"]
    if moe.num_experts < group.size:
        raise ValueError(
            f"expert_parallel_size={group.size} exceeds moe.num_experts={moe.num_experts}; choose at most one rank per expert"
        )
    router = make_router(ops, moe, spec.width, spec.seed, spec.std)
    owner_E = owners(moe.num_experts, group.size)
    mine = np.flatnonzero(owner_E == group.index)
    residency = Owned(ops, moe, spec.width, mine, spec.seed, spec.std)
    shared, shared_parameters = _shared_experts(ops, moe, spec)
    layer = MoELayer(
        ops=ops,
        comm=runtime.comm,
        group=group,
        num_experts=moe.num_experts,
        router=router,
        planner=_planner(slot_table(owner_E, group.size)),
        transport=_transport(moe, runtime),
        residency=residency,
        shared=shared,
        checkpoint_experts=spec.checkpoint_experts,
    )
    parameters = router.parameters(spec.prefix) + residency.parameters(spec.prefix, spec.std_down) + shared_parameters
    return LayerParts(layer, parameters)


def _planner(slots_RC: np.ndarray) -> Planner:
    return lambda counts_RE: plan_static(counts_RE, slots_RC)


def _transport(moe: MoeConfig, runtime: Runtime) -> Transport:
    group = runtime.groups["expert"]
    return Local(runtime.ops, moe.num_experts) if group.size == 1 else Flat(runtime.ops, runtime.comm, group)


def _shared_experts(ops: Ops, moe: MoeConfig, spec: LayerSpec):  # noqa: ANN202
    """The dense expert that every token visits (optionally scaled by a sigmoid gate), and its parameters."""
    if not moe.num_shared_experts:
        return None, ()
    hidden = moe.num_shared_experts * (moe.shared_expert_hidden_size or moe.expert_hidden_size)
    declare = Declare(spec.prefix, spec.seed)
    made = mlp_parameters("w_shared", spec.width, hidden, moe.activation, (spec.std, spec.std_down), declare)
    if moe.shared_expert_gate:
        made.append(declare("w_shared_gate", (spec.width, 1), spec.std))

    def shared(params: Mapping[str, Array], x_TD: Array) -> Array:
        y_TD = mlp(ops, moe.activation, params["w_shared_up"], params["w_shared_down"], x_TD)
        return y_TD * ops.sigmoid(x_TD @ params["w_shared_gate"]) if moe.shared_expert_gate else y_TD

    return shared, tuple(made)
