"""How large a config is: parameters, memory per rank, bytes per step. Nothing is allocated.

The counts are those of the components that a training run would build; their first values are never drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from types import SimpleNamespace
from typing import Any, cast

from ..backends.protocol import Communicator, Group, Parameter
from ..backends.registry import communicator_bytes, load
from .build import GROUPS, Runtime
from .combinations import ConfigError, mesh_of
from .config import Config
from .mesh import Mesh
from .model import build_model
from .planning import slot_count
from .topology import topology_of
from .transport.hierarchical import hierarchy_groups

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes that rank 0 holds. activations is an estimate: what backward keeps of one micro-batch.

    communicators: buffers of the transport, where it keeps some for every group of ranks (HCCL).
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    communicators: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.communicators


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one optimizer step, with even routing and ring reductions.

    weights: sharded experts that are gathered for each call, and their gradients on the way back. tensor: sums,
    gathers and scatters inside tensor groups.
    """

    dispatch_and_combine: int
    gradients: int
    weights: int = 0
    tensor: int = 0

    @property
    def total(self) -> int:
        return self.dispatch_and_combine + self.gradients + self.weights + self.tensor


@dataclass(frozen=True)
class Shapes:
    """The answer to `--dry-run`."""

    ranks: int
    mesh: Mesh
    parameters_total: int
    parameters_active: int
    memory_per_rank: Memory
    bytes_per_step: Traffic

    def lines(self) -> list[str]:
        """What people read, one fact a line."""
        memory, sent = self.memory_per_rank, self.bytes_per_step
        m = self.mesh
        return [
            f"parameters {_large(self.parameters_total)}, {_large(self.parameters_active)} of them active for a token",
            f"{self.ranks} ranks: data {m.data} x head {m.head} x expert {m.expert} x tensor {m.tensor}",
            f"memory per rank {_large(memory.total)}B: parameters {_large(memory.parameters)}B, gradients "
            f"{_large(memory.gradients)}B, optimizer {_large(memory.optimizer)}B, activations about "
            f"{_large(memory.activations)}B"
            + (f", communicators {_large(memory.communicators)}B" if memory.communicators else ""),
            f"sent per rank and step {_large(sent.total)}B: dispatch and combine {_large(sent.dispatch_and_combine)}B, "
            f"gradients {_large(sent.gradients)}B, weights {_large(sent.weights)}B"
            + (f", inside tensor groups {_large(sent.tensor)}B" if sent.tensor else ""),
        ]

    def as_dict(self) -> dict[str, Any]:
        known = asdict(self)
        known["memory_per_rank"]["total"] = self.memory_per_rank.total
        known["bytes_per_step"]["total"] = self.bytes_per_step.total
        return known


def shapes(config: Config, ranks: int = 1, backend: str | None = None) -> Shapes:
    """Sizes of `config` on so many ranks. ConfigError where they do not form its mesh.

    backend: whose transport's buffers count as memory; without it none do.
    """
    mesh = mesh_of(config, ranks)
    whole = list(declared(config, Mesh()))
    return Shapes(
        ranks=ranks,
        mesh=mesh,
        parameters_total=sum(_size(p) for p in whole),
        parameters_active=round(sum(_size(p) * _active_share(config, p) for p in whole)),
        memory_per_rank=_memory(config, mesh, backend),
        bytes_per_step=_traffic(config, mesh),
    )


def declared(config: Config, mesh: Mesh) -> Iterator[Parameter]:
    """The parameters that rank 0 of a mesh would store. ConfigError where the layer can't be built."""
    groups = {name: _group(mesh, name, axes) for name, axes in GROUPS.items()}
    backend = load("reference")
    runtime = Runtime(backend.ops, _no_communicator(), mesh, groups)
    try:
        components = build_model(config, runtime).components
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for component in components:
        yield from component.parameters


def moe_layers(config: Config) -> int:
    return config.model.num_layers - config.model.num_dense_layers


def _memory(config: Config, mesh: Mesh, backend: str | None) -> Memory:
    width = max(4, _BYTES[config.train.dtype])
    computed = _BYTES[config.train.dtype]
    sharded = mesh.size if config.parallel.data_sharding == "full" else 1
    stored = sum(_size(p) // (1 if _is_expert(p) else sharded) for p in declared(config, mesh))
    copies = stored * computed if computed < width else 0
    return Memory(
        parameters=stored * width + copies,
        gradients=stored * width,
        optimizer=2 * stored * width,
        activations=_activations(config, mesh),
        communicators=_communicators(config, mesh, backend) if backend else 0,
    )


def _communicators(config: Config, mesh: Mesh, backend: str) -> int:
    return communicator_bytes(backend, _rank_groups(config, mesh), config.communication.model_dump())


def _rank_groups(config: Config, mesh: Mesh) -> list[tuple[int, ...]]:
    """Ranks of every group of several that rank 0 opens, the whole job's own first."""
    found = [tuple(range(mesh.size)), *(_group(mesh, name, axes).ranks for name, axes in GROUPS.items())]
    if config.parallel.transport == "hierarchical_dedup":
        topology = topology_of(config.cluster, mesh.partition("expert"))
        found += [group.ranks for group in hierarchy_groups(cast(Communicator, _Grouping()), mesh, topology).values()]
    return [ranks for ranks in found if len(ranks) > 1]


class _Grouping:
    """The part of a communicator that names groups, for rank 0, talking to nobody."""

    def group(self, name: str, partition: Sequence[Sequence[int]]) -> Group:
        ranks = next(tuple(part) for part in partition if 0 in part)
        return Group(name, ranks, ranks.index(0))


def _activations(config: Config, mesh: Mesh) -> int:
    """Tensors that backward reads: per layer the inputs of each product, of each norm and activation; and logits."""
    model, moe = config.model, config.moe
    tokens = _tokens_per_micro_batch(config, mesh)
    head = model.attention_head_dim or model.hidden_size // model.num_attention_heads
    heads = model.num_attention_heads + 2 * (model.num_key_value_heads or model.num_attention_heads)
    attention = 3 * model.hidden_size + 2 * head * heads
    width = _routed_width(config)
    experts = moe.top_k * (2 * width + (moe.gates + 1) * moe.expert_hidden_size * moe.num_heads)
    experts += 2 * width if moe.num_heads > 1 else 0
    dense = (moe.gates + 1) * (model.dense_hidden_size or moe.expert_hidden_size * moe.top_k)
    if config.train.recompute == "layer":
        per_token = model.num_layers * model.hidden_size + attention + experts
    elif config.train.recompute == "experts":
        per_token = model.num_layers * attention + moe_layers(config) * moe.top_k * 2 * width
        per_token += model.num_dense_layers * dense
    else:
        per_token = model.num_layers * attention + moe_layers(config) * experts + model.num_dense_layers * dense
    logits = 2 * model.vocab_size * max(4, _BYTES[config.train.dtype])
    return tokens * (per_token * _BYTES[config.train.dtype] + logits)


def _traffic(config: Config, mesh: Mesh) -> Traffic:
    """Rows go out and back in forward, and their gradients in backward; recomputing a layer sends them again.

    Heads go to their ranks once, whatever top_k is; inside a head's ranks its rows travel like any.
    """
    tokens = config.train.global_batch_size // mesh.token_ranks * config.train.sequence_length
    away, to_heads = (mesh.expert - 1) / mesh.expert, (mesh.head - 1) / mesh.head
    exchanges = 6 if config.train.recompute == "layer" else 4
    row = _routed_width(config) * _BYTES[config.train.dtype]
    slices = mesh.tensor if config.parallel.transport == "groupwise" and mesh.expert > 1 else 1
    sent = moe_layers(config) * tokens * exchanges * row * (config.moe.top_k * away / slices + to_heads)
    reduced = 0.0
    for parameter in declared(config, mesh):
        ranks = prod(getattr(mesh, axis) for axis in GROUPS[parameter.reduce_over])
        reduced += 2 * (ranks - 1) / ranks * _size(parameter) * max(4, _BYTES[config.train.dtype])
    inside = _inside_tensor_groups(config, mesh, tokens)
    return Traffic(round(sent), round(reduced), round(_weights_sent(config, mesh) * away), round(inside))


def _inside_tensor_groups(config: Config, mesh: Mesh, tokens: int) -> float:
    """A sum of all tokens after attention and after each dense, shared or summed feed-forward; a group-wise exchange
    gathers, scatters and gathers the rows of all choices instead. Backward sends the same again, a layer that is
    computed again once more.
    """
    moe, layers = config.moe, moe_layers(config)
    token = config.model.hidden_size * _BYTES[config.train.dtype]
    shared = layers if moe.num_shared_experts else 0
    groupwise = config.parallel.transport == "groupwise" and mesh.expert > 1
    sums = config.model.num_layers + config.model.num_dense_layers + shared + (0 if groupwise else layers)
    handed = 2 * sums + (3 * layers * moe.top_k if groupwise else 0)
    ways = 3 if config.train.recompute == "layer" else 2
    return ways * tokens * token * handed * (mesh.tensor - 1) / mesh.tensor


def _weights_sent(config: Config, mesh: Mesh) -> float:
    """Bytes of the experts in a rank's slots, each way, for every micro-batch and layer."""
    if config.parallel.residency != "fully_sharded":
        return 0.0
    width = config.moe.head_dim or config.model.hidden_size
    expert = (config.moe.gates + 1) * width * config.moe.expert_hidden_size * _BYTES[config.train.dtype]
    share = max(1, config.train.global_batch_size // mesh.token_ranks)
    calls = moe_layers(config) * -(-share // (config.train.micro_batch_size or share))
    ways = 2 if config.train.recompute == "none" else 3
    return calls * ways * slot_count(config.moe, config.parallel, mesh.expert) * expert


def _routed_width(config: Config) -> int:
    """Width of what is routed of a token: itself, or all of its heads."""
    moe = config.moe
    return moe.num_heads * moe.head_dim if moe.num_heads > 1 and moe.head_dim else config.model.hidden_size


def _tokens_per_micro_batch(config: Config, mesh: Mesh) -> int:
    share = max(1, config.train.global_batch_size // mesh.token_ranks)
    return (config.train.micro_batch_size or share) * config.train.sequence_length


def _active_share(config: Config, parameter: Parameter) -> float:
    routed = _is_expert(parameter) and not parameter.name.endswith("w_router")
    return config.moe.top_k / config.moe.num_experts if routed else 1.0


def _is_expert(parameter: Parameter) -> bool:
    return bool(parameter.pieces)


def _size(parameter: Parameter) -> int:
    return prod(parameter.shape)


def _large(number: int) -> str:
    """12.3 G and so on."""
    value, units = float(number), iter(("", "k", "M", "G", "T", "P"))
    unit = next(units)
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}".rstrip()


def _group(mesh: Mesh, name: str, axes: tuple[str, ...]) -> Group:
    ranks = next(group for group in mesh.partition(*axes) if 0 in group)
    return Group(name, tuple(ranks), ranks.index(0))


def _no_communicator() -> Any:
    """Declaring parameters talks to nobody, and asks only whether exchanges could overlap."""
    return SimpleNamespace(no_overlap=None)
