"""What does not combine, and why. Read when a config is read; `check_ranks` when the number of ranks is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .config import Config
from .mesh import Mesh
from .routing import router_names


class ConfigError(ValueError):
    """A config that can't be used: one sentence that says what to change, on one line whatever it quotes."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


@dataclass(frozen=True)
class Rule:
    """Two options that exclude each other. refuses(config) is True where they meet."""

    first: str
    second: str
    why: str
    refuses: Callable[[Config], bool]

    def sentence(self, config: Config) -> str:
        return f"{_told(config, self.first)} and {_told(config, self.second)} do not combine: {self.why}"


def _hidden_sizes(config: Config) -> list[int]:
    moe, model = config.moe, config.model
    sizes = [moe.expert_hidden_size]
    sizes += [moe.num_shared_experts * (moe.shared_expert_hidden_size or moe.expert_hidden_size)]
    return sizes + ([model.dense_hidden_size or moe.expert_hidden_size * moe.top_k] if model.num_dense_layers else [])


def _attention_heads(config: Config) -> tuple[int, int]:
    model = config.model
    return model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads


def _zero_router_gradient(config: Config) -> bool:
    moe = config.moe
    normalised = moe.norm_topk_prob or (moe.score_function == "softmax" and moe.softmax_order == "after_topk")
    return moe.router == "topk" and moe.top_k == 1 and normalised and moe.num_experts > 1


def _on_nodes(config: Config, nodes: tuple[int, ...]) -> bool:
    return len(nodes) == config.moe.num_experts and all(0 <= node < config.moe.locality_nodes for node in nodes)


RULES: tuple[Rule, ...] = (
    Rule(
        "parallel.planner",
        "parallel.residency",
        "a static plan sends rows to owners only, so nothing is borrowed; choose residency owned or fully_sharded",
        lambda c: c.parallel.planner == "static" and c.parallel.residency == "borrowed",
    ),
    Rule(
        "parallel.planner",
        "parallel.residency",
        "this planner sends rows to ranks that do not own the expert; choose residency borrowed or fully_sharded",
        lambda c: c.parallel.planner in ("least_loaded", "relayout") and c.parallel.residency == "owned",
    ),
    Rule(
        "parallel.placement",
        "parallel.residency",
        "sharded experts have no owner that could be swapped; choose placement fixed, or residency owned or borrowed",
        lambda c: c.parallel.placement == "swap" and c.parallel.residency == "fully_sharded",
    ),
    Rule(
        "parallel.placement",
        "moe.num_heads",
        "experts of one head rest with its rank and are not moved; choose placement fixed, or num_heads 1",
        lambda c: c.parallel.placement == "swap" and c.moe.num_heads > 1,
    ),
    Rule(
        "parallel.transport",
        "parallel.tensor_parallel_size",
        "rows are cut over a tensor-parallel group; set tensor_parallel_size > 1 or transport flat",
        lambda c: c.parallel.transport == "groupwise" and c.parallel.tensor_parallel_size == 1,
    ),
    Rule(
        "parallel.overlap_chunks",
        "parallel.transport",
        "each stage waits for the one before it; choose transport flat or groupwise, or overlap_chunks 1",
        lambda c: c.parallel.overlap_chunks > 1 and c.parallel.transport == "hierarchical_dedup",
    ),
    Rule(
        "parallel.overlap_chunks",
        "parallel.tensor_parallel_size",
        "whole rows of a tensor group do not travel in parts; choose transport groupwise, or overlap_chunks 1",
        lambda c: (
            c.parallel.overlap_chunks > 1 and c.parallel.tensor_parallel_size > 1 and c.parallel.transport == "flat"
        ),
    ),
    Rule(
        "parallel.prefetch_layers",
        "parallel.residency",
        "only sharded experts are gathered for every call; choose residency fully_sharded, or prefetch_layers 0",
        lambda c: c.parallel.prefetch_layers > 0 and c.parallel.residency != "fully_sharded",
    ),
    Rule(
        "parallel.prefetch_layers",
        "parallel.planner",
        "its slots follow from the counts of the same call; choose planner relayout or static, or prefetch_layers 0",
        lambda c: c.parallel.prefetch_layers > 0 and c.parallel.planner == "least_loaded",
    ),
    Rule(
        "parallel.prefetch_layers",
        "train.recompute",
        "weights that come a second time would come in their own layer; choose recompute none, or prefetch_layers 0",
        lambda c: c.parallel.prefetch_layers > 0 and c.train.recompute != "none",
    ),
    Rule(
        "parallel.prefetch_layers",
        "parallel.data_sharding",
        "a module of sharded parameters is entered once per pass; choose data_sharding none, or prefetch_layers 0",
        lambda c: c.parallel.prefetch_layers > 0 and c.parallel.data_sharding == "full",
    ),
    Rule(
        "parallel.prefetch_layers",
        "moe.num_heads",
        "layers of several heads fetch their own experts; choose num_heads 1, or prefetch_layers 0",
        lambda c: c.parallel.prefetch_layers > 0 and c.moe.num_heads > 1,
    ),
    Rule(
        "parallel.tensor_parallel_size",
        "parallel.residency",
        "shards are cut across columns already; choose residency owned or borrowed, or tensor_parallel_size 1",
        lambda c: c.parallel.tensor_parallel_size > 1 and c.parallel.residency == "fully_sharded",
    ),
    Rule(
        "parallel.tensor_parallel_size",
        "moe.num_heads",
        "heads are shared by rank, not cut by column; use head_parallel_size, or tensor_parallel_size 1",
        lambda c: c.parallel.tensor_parallel_size > 1 and c.moe.num_heads > 1,
    ),
    Rule(
        "parallel.tensor_parallel_size",
        "moe.expert_hidden_size",
        "every rank gets the same number of columns; choose a tensor_parallel_size that divides the hidden sizes",
        lambda c: any(size % c.parallel.tensor_parallel_size for size in _hidden_sizes(c)),
    ),
    Rule(
        "parallel.tensor_parallel_size",
        "model.num_attention_heads",
        "every rank gets the same number of heads; choose a tensor_parallel_size that divides them and key-value heads",
        lambda c: any(heads % c.parallel.tensor_parallel_size for heads in _attention_heads(c)),
    ),
    Rule(
        "parallel.tensor_parallel_size",
        "moe.expert_bias",
        "the output's bias would be added once per rank; choose expert_bias false, or tensor_parallel_size 1",
        lambda c: c.parallel.tensor_parallel_size > 1 and c.moe.expert_bias,
    ),
    Rule(
        "parallel.tensor_parallel_size",
        "model.qk_norm",
        "a norm over all heads needs them on one rank; choose qk_norm true or false, or tensor_parallel_size 1",
        lambda c: c.parallel.tensor_parallel_size > 1 and c.model.qk_norm == "whole",
    ),
    Rule(
        "moe.activation",
        "moe.num_shared_experts",
        "only routed experts have the clamped activation; choose swiglu, or num_shared_experts 0",
        lambda c: c.moe.activation == "swiglu_clamped" and c.moe.num_shared_experts > 0,
    ),
    Rule(
        "moe.activation",
        "moe.expert_bias",
        "biases come with the gated activations; choose swiglu or swiglu_clamped, or expert_bias false",
        lambda c: c.moe.activation == "gelu" and c.moe.expert_bias,
    ),
    Rule(
        "moe.router",
        "moe.router_bias",
        "only the top-k and Switch gates have a bias of their own; choose router topk, or router_bias false",
        lambda c: c.moe.router_bias and (c.moe.router not in ("topk", "switch") or c.moe.num_heads > 1),
    ),
    Rule(
        "parallel.head_parallel_size",
        "moe.num_heads",
        "there is only one head to share; set moe.num_heads > 1 or head_parallel_size 1",
        lambda c: c.parallel.head_parallel_size > 1 and c.moe.num_heads == 1,
    ),
    Rule(
        "parallel.head_parallel_size",
        "moe.num_heads",
        "every rank gets the same number of heads; choose a head_parallel_size that divides num_heads",
        lambda c: c.moe.num_heads % c.parallel.head_parallel_size != 0,
    ),
    Rule(
        "moe.num_heads",
        "moe.head_dim",
        "sub-tokens need a width; set moe.head_dim",
        lambda c: c.moe.num_heads > 1 and c.moe.head_dim is None,
    ),
    Rule(
        "moe.num_heads",
        "moe.top_k",
        "weights are normalised over the chosen, so with one the router gets no gradient; choose top_k > 1",
        lambda c: c.moe.num_heads > 1 and c.moe.top_k == 1 and c.moe.num_experts > 1,
    ),
    Rule(
        "moe.top_k",
        "moe.norm_topk_prob",
        "a single weight that is normalised is always 1 and the router gets no gradient; "
        "set moe.norm_topk_prob=false with softmax_order before_topk, or top_k > 1",
        _zero_router_gradient,
    ),
    Rule(
        "moe.router",
        "moe.top_k",
        "Switch sends a token to one expert; set moe.top_k=1 or moe.router=topk",
        lambda c: c.moe.router == "switch" and c.moe.top_k != 1,
    ),
    Rule(
        "moe.num_experts",
        "moe.num_groups",
        "groups have equal size; choose a num_groups that divides num_experts",
        lambda c: c.moe.num_experts % c.moe.num_groups != 0,
    ),
    Rule(
        "moe.group_top_k",
        "moe.num_groups",
        "a token can't use more groups than there are; choose group_top_k <= num_groups",
        lambda c: c.moe.group_top_k > c.moe.num_groups,
    ),
    Rule(
        "moe.top_k",
        "moe.group_top_k",
        "the groups that a token may use hold fewer experts than it chooses; raise group_top_k or lower top_k",
        lambda c: c.moe.num_groups > 1 and c.moe.top_k > c.moe.group_top_k * c.moe.num_experts // c.moe.num_groups,
    ),
    Rule(
        "moe.shared_expert_gate",
        "moe.num_shared_experts",
        "there is no shared expert to gate; set num_shared_experts or shared_expert_gate false",
        lambda c: c.moe.shared_expert_gate and c.moe.num_shared_experts == 0,
    ),
    Rule(
        "model.num_dense_layers",
        "model.num_layers",
        "more dense layers than layers; lower num_dense_layers",
        lambda c: c.model.num_dense_layers > c.model.num_layers,
    ),
    Rule(
        "model.sliding_layers",
        "model.num_layers",
        "layers are counted from 0; name layers that the model has",
        lambda c: any(not 0 <= layer < c.model.num_layers for layer in c.model.sliding_layers or ()),
    ),
    Rule(
        "moe.locality_expert_nodes",
        "moe.locality_nodes",
        "every expert has a node, counted from 0; give moe.num_experts numbers below locality_nodes, or null",
        lambda c: c.moe.locality_expert_nodes is not None and not _on_nodes(c, c.moe.locality_expert_nodes),
    ),
    Rule(
        "train.min_learning_rate",
        "train.learning_rate",
        "the schedule falls from learning_rate to min_learning_rate; choose min_learning_rate <= learning_rate",
        lambda c: c.train.min_learning_rate > c.train.learning_rate,
    ),
    Rule(
        "data.source",
        "data.paths",
        "this source reads files; name them in data.paths",
        lambda c: c.data.source in ("text", "memmap", "megatron") and not c.data.paths,
    ),
    Rule(
        "data.source",
        "data.dataset",
        "this source reads a data set; name it in data.dataset, or local files in data.paths",
        lambda c: c.data.source == "hf" and c.data.dataset is None and not c.data.paths,
    ),
    Rule(
        "data.dataset",
        "data.paths",
        "a data set and files are two sources; take one out with data.paths=[] or data.dataset=null",
        lambda c: c.data.source == "hf" and c.data.dataset is not None and bool(c.data.paths),
    ),
)
"""The table. An entry names the two options by their place in the config and says why and what to do."""


def check_combinations(config: Config, rules: Sequence[Rule] = RULES) -> None:
    """ConfigError: the router is unknown, or the first rule that refuses this config."""
    if config.moe.router not in router_names():
        raise ConfigError(f"moe.router={config.moe.router} is unknown; choose one of {', '.join(router_names())}")
    for rule in rules:
        if rule.refuses(config):
            raise ConfigError(rule.sentence(config))


def mesh_of(config: Config, ranks: int) -> Mesh:
    """The mesh that a config makes of so many ranks. ConfigError where the sizes do not fit.

    expert_parallel_size auto takes the most ranks that divide what is left and do not outnumber the experts.
    """
    p = config.parallel
    expert = p.expert_parallel_size
    if expert == "auto":
        free = ranks // (p.head_parallel_size * p.tensor_parallel_size) or 1
        expert = next(n for n in range(min(free, config.moe.num_experts), 0, -1) if free % n == 0)
    try:
        return Mesh.over(ranks, expert=expert, head=p.head_parallel_size, tensor=p.tensor_parallel_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_ranks(config: Config, ranks: int) -> Mesh:
    """The mesh of so many ranks, each with tokens of its own getting equally many sequences. ConfigError otherwise."""
    mesh = mesh_of(config, ranks)
    sequences, micro = config.train.global_batch_size, config.train.micro_batch_size
    if mesh.token_ranks > sequences:
        raise ConfigError(
            f"{mesh.token_ranks} ranks are more than train.global_batch_size={sequences} sequences; "
            f"use at most {sequences} ranks or a larger global batch"
        )
    if sequences % mesh.token_ranks:
        raise ConfigError(
            f"train.global_batch_size={sequences} can't be shared equally by {mesh.token_ranks} ranks; "
            f"choose a multiple of {mesh.token_ranks}, or other ranks"
        )
    if micro is not None and (sequences // mesh.token_ranks) % micro:
        raise ConfigError(
            f"train.micro_batch_size={micro} does not divide the {sequences // mesh.token_ranks} sequences of a rank; "
            "choose a divisor"
        )
    if mesh.expert > config.moe.num_experts:
        raise ConfigError(
            f"{mesh.expert} ranks would share moe.num_experts={config.moe.num_experts} experts; "
            f"set parallel.expert_parallel_size to at most {config.moe.num_experts}"
        )
    return mesh


def check_trainable(config: Config) -> None:
    """ConfigError for a config that describes the shape of a layer only."""
    if config.model.layer_shape_only:
        raise ConfigError(
            f"{config.name} is the shape of a layer, not a model that twinmoe can train (its other parts differ); "
            "use it with --dry-run and bench, or set model.layer_shape_only=false"
        )


def _told(config: Config, field: str) -> str:
    value = config
    for part in field.split("."):
        value = getattr(value, part)
    return f"{field}={value if value is not None else 'null'}"
