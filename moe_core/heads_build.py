"""From a config to a `HeadsLayer`: an ordinary layer for this rank's heads, its parameters named by global head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.protocol import Parameter, Piece
from .config import MoeConfig, ParallelConfig
from .heads import HeadsLayer
from .heads_exchange import HeadExchange, Heads
from .heads_router import HeadsRouter
from .parameters import draw
from .residency.owned import expert_name, expert_shapes
from .routing.base import RouterContext
from .transformer import Declare

if TYPE_CHECKING:
    from .build import LayerParts, LayerSpec, Runtime

Build = Callable[[MoeConfig, ParallelConfig, "Runtime", "LayerSpec"], "LayerParts"]

NORM_OVER = {"expert": "head_expert"}
"""Disjoint parts of a residency's parameters are spread over the heads' ranks too."""


def build_heads(
    moe: MoeConfig,
    parallel: ParallelConfig,
    runtime: Runtime,
    spec: LayerSpec,
    build: Build,
    shared: tuple[Any, tuple[Parameter, ...]],
) -> LayerParts:
    """The layer of `moe.num_heads` heads. build: makes an ordinary layer; shared: shared experts, their parameters.

    Experts' second matrices are not scaled with depth (as published: W_out, which writes to the residual, is).
    """
    check_heads(moe, parallel, runtime)
    assert moe.head_dim is not None
    heads = Heads(moe.num_heads, moe.head_dim, moe.num_experts, runtime.groups["head"])
    own = {"num_heads": 1, "head_dim": None, "num_shared_experts": 0, "shared_expert_gate": False}
    one_head = moe.model_copy(update=own)
    context = RouterContext(
        runtime.ops,
        one_head,
        heads.dim,
        spec.seed,
        spec.std,
        spec.layer,
        None,
        runtime.comm,
        runtime.groups["head_data"],
    )
    inner_spec = replace(spec, width=heads.dim, std_down=spec.std, router=HeadsRouter(context, heads))
    rank_moe = one_head.model_copy(update={"num_experts": heads.count * heads.experts})
    inner = build(rank_moe, parallel, runtime, inner_spec)
    named = Naming(heads, spec.prefix, spec.seed, rank_moe, spec.std)
    layer = HeadsLayer(HeadExchange(runtime.ops, runtime.comm, heads), inner.layer, shared[0], parallel.head_chunks)  # type: ignore[arg-type]
    parameters = (*_projections(heads, spec), *(named.relabel(p) for p in inner.parameters), *shared[1])
    return replace(inner, layer=layer, parameters=parameters)


def _projections(heads: Heads, spec: LayerSpec) -> tuple[Parameter, ...]:
    """W_in and W_out, whole on every rank."""
    declare, width = Declare(spec.prefix, spec.seed), heads.total * heads.dim
    return declare("w_in", (spec.width, width), spec.std), declare("w_out", (width, spec.width), spec.std_down)


class Naming:
    """Experts of a rank's layer have ids h * E + e; what they are called and how they start depends on the global h."""

    def __init__(self, heads: Heads, prefix: str, seed: int, moe: MoeConfig, std: float) -> None:
        self._seed, self._prefix = seed, prefix
        shapes = expert_shapes(moe, heads.dim, std, std)
        self._shapes = {prefix + name: (shape, std) for name, shape, std in shapes}
        self._experts: dict[str, tuple[str, int]] = {}
        for j in range(heads.count * heads.experts):
            h, e = divmod(heads.first * heads.experts + j, heads.experts)
            for name, _, _ in shapes:
                logical = head_expert_name(prefix, h, e, name), h * heads.experts + e
                self._experts[expert_name(prefix, j, name)] = logical

    def relabel(self, parameter: Parameter) -> Parameter:
        """The parameter of a residency under its global names; others as they are."""
        if parameter.name not in self._shapes:
            return parameter
        logical = [self._experts[piece.name] for piece in parameter.pieces]
        pieces = tuple(replace(piece, name=name) for piece, (name, _) in zip(parameter.pieces, logical, strict=True))
        shape, std = self._shapes[parameter.name]

        def initial() -> np.ndarray:
            out = np.zeros(parameter.shape)
            for row, piece, (_, expert) in zip(out, pieces, logical, strict=True):
                write_part(row, draw(self._seed, parameter.name, shape, std, expert=expert), piece)
            return out

        norm_over = NORM_OVER.get(parameter.norm_over or "", parameter.norm_over)
        return replace(parameter, initial=initial, pieces=pieces, norm_over=norm_over)


def head_expert_name(prefix: str, head: int, expert: int, name: str) -> str:
    """Name of one expert's tensor in checkpoints."""
    return f"{prefix}heads.{head}.experts.{expert}.{name}"


def write_part(row: np.ndarray, whole: np.ndarray, piece: Piece) -> None:
    """The elements of `whole` that `piece` names, into the front of `row` (the rest is padding)."""
    if piece.stop is None:
        row[...] = whole
    elif piece.axis is None:
        part = whole.reshape(-1)[piece.start : piece.stop]
        row[: len(part)] = part
    else:
        row[...] = np.take(whole, np.arange(piece.start, piece.stop), piece.axis)


def check_heads(moe: MoeConfig, parallel: ParallelConfig, runtime: Runtime) -> None:
    """ValueError for what Multi-Head LatentMoE does not do, in one sentence."""
    chunked = parallel.head_chunks > 1
    weighs = moe.softmax_order == "after_topk" or moe.norm_topk_prob
    refused: Mapping[str, bool] = {
        "moe.head_dim is not set; set it to the width of a head": moe.head_dim is None,
        f"moe.num_heads={moe.num_heads} heads can't be shared equally by {runtime.groups['head'].size} ranks; choose a "
        "head_parallel_size that divides num_heads": moe.num_heads % runtime.groups["head"].size != 0,
        f"moe.router={moe.router} has no heads; set moe.router=topk": moe.router != "topk",
        "heads weigh by a softmax over the chosen; set moe.score_function=softmax": moe.score_function != "softmax",
        "heads weigh by a softmax over the chosen; set moe.norm_topk_prob=true": not weighs,
        "heads have no groups of experts; set moe.num_groups=1": moe.num_groups > 1,
        "heads drop nothing; set moe.capacity_factor=null, capacity_rule=factor and affinity_mass=null": (
            moe.capacity_factor is not None or moe.capacity_rule != "factor" or moe.affinity_mass is not None
        ),
        "heads have no locality loss; set moe.locality_loss_coeff=0 and locality_nodes=1": (
            moe.locality_loss_coeff > 0 or moe.locality_nodes > 1
        ),
        "heads are balanced one by one; set moe.aux_loss_layers=separate": moe.aux_loss_layers != "separate",
        "heads do not jitter; set moe.router_jitter=0": moe.router_jitter > 0,
        "heads do not skip tokens that are not finite; set moe.nan_policy=raise": moe.nan_policy != "raise",
        "halves are for heads that one rank has whole; set parallel.head_chunks=1 or expert_parallel_size=1": (
            chunked and runtime.groups["expert"].size > 1
        ),
        "moe.aux_loss_scope=global pools a whole micro-batch; set parallel.head_chunks=1": (
            chunked and moe.aux_loss_scope == "global" and moe.aux_loss_coeff > 0
        ),
        "heads are not cut over tensor-parallel ranks; set parallel.tensor_parallel_size=1": runtime.mesh.tensor > 1,
    }
    for sentence, applies in refused.items():
        if applies:
            raise ValueError(sentence)
