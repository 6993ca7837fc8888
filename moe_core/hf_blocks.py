"""The experts of a loaded transformers model, spread over ranks inside somebody else's Trainer or accelerate script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..backends.protocol import Array, Component, Launch, Ops, Parameter
from ..backends.registry import Backend, load, model_blocks, read_launch
from .build import LayerParts, LayerSpec, Runtime, build_layer, make_runtime
from .combinations import ConfigError, mesh_of
from .compose import load_config
from .config import Config
from .init_from import cut, started_from
from .routing.base import Memo, Routing, State, Tokens
from .topology import cluster_of_launch

IDS, WEIGHTS = "ids", "weights"


class GivenChoices:
    """A `Router` for tokens whose experts and weights somebody else chose: they come with the call's memo."""

    def __init__(self, ops: Ops, top_k: int) -> None:
        self._ops, self._top_k = ops, top_k

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        return ()

    def route(self, params: Mapping[str, Array], x_TD: Array, tokens: Tokens, memo: Memo) -> Routing:
        ids_TK, weights_TK = memo.decided[IDS], memo.decided[WEIGHTS]
        if ids_TK.shape[0] == 0:  # a rank without tokens, which takes part with one of padding
            ids_TK = self._ops.asarray(np.full((x_TD.shape[0], self._top_k), -1))
            none_TK = self._ops.asarray(np.zeros(ids_TK.shape, np.float32))
            weights_TK = self._ops.cast(none_TK, self._ops.dtype_of(weights_TK))
        return Routing(ids_TK, ids_TK, weights_TK, {})

    def initial_state(self) -> dict[str, np.ndarray]:
        return {}

    def update_state(self, state: State, totals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {}


class BlockSource:
    """init_from.Source over one block of their model."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def local(self, parameter: Parameter) -> np.ndarray:
        found = []
        for piece in parameter.pieces:
            _, expert, name = piece.name.split(".")
            found.append(cut(self._block.expert(int(expert), name), piece))
        return np.stack(found)


def replace_moe_blocks(
    model: Any,
    parallel: Mapping[str, Any] | None = None,
    backend: Backend | str | None = None,
    launch: Launch | None = None,
) -> int:
    """Swap the expert modules of a loaded transformers model for ours, weights kept; returns how many. Collective.

    parallel: the section `parallel` of a config, for example {"scheme": "llep"}. Call it after loading and before the
    model is wrapped; every rank has loaded the same weights. Router, shared experts and balance loss stay theirs.
    Clipping needs `ExpertClipping` (backends/torch_shared/blocks.py); `restore_moe_blocks` before save_pretrained.
    ConfigError or ValueError for what can't be run this way.
    """
    home = backend if isinstance(backend, Backend) else load(backend)
    blocks = model_blocks(home.name)
    launch = launch or read_launch()
    comm = home.comm.connect(launch)
    found = blocks.find(model)
    top_k = int(model.config.num_experts_per_tok)
    configs = [_config(model.config, block, top_k, parallel or {}) for block in found]
    cluster = cluster_of_launch(launch, configs[0].cluster)
    runtime = make_runtime(home.ops, comm, mesh_of(configs[0], comm.size), configs[0].parallel, cluster)
    for index, (block, config) in enumerate(zip(found, configs)):
        router = GivenChoices(home.ops, top_k)
        parts = build_layer(
            config.moe, config.parallel, runtime, LayerSpec(block.width, "", layer=index, router=router)
        )
        blocks.swap(model, block, _component(parts, runtime, block), runtime.groups, comm)
    blocks.exclude(model)
    return len(found)


def restore_moe_blocks(model: Any, backend: Backend | str | None = None) -> None:
    """Put their modules back with the weights of now, whole on every rank: before save_pretrained. Collective."""
    home = backend if isinstance(backend, Backend) else load(backend)
    model_blocks(home.name).restore(model)


def _component(parts: LayerParts, runtime: Runtime, block: Any) -> Component:
    def forward(params: Mapping[str, Array], x_TD: Array, ids_TK: Array, weights_TK: Array, training: bool) -> Array:
        rows = x_TD.shape[0]
        tokens = Tokens(sequences=1, total=float(max(rows, 1)), training=training)
        return parts.layer(params, x_TD, tokens, Memo(decided={IDS: ids_TK, WEIGHTS: weights_TK})).y

    component = Component(block.name, parts.parameters, forward)
    return started_from((component,), BlockSource(block))[0]


def _config(about: Any, block: Any, top_k: int, parallel: Mapping[str, Any]) -> Config:
    """The block as `moe`, what was asked for as `parallel`. ConfigError for what a loop of ours would have to do."""
    moe: dict[str, Any] = {"num_experts": block.num_experts, "top_k": top_k, "expert_hidden_size": block.hidden}
    moe |= {"norm_topk_prob": top_k > 1, "aux_loss_coeff": 0.0}
    if block.woven:
        moe |= {"activation": "swiglu_clamped", "expert_bias": True}
        moe |= {"swiglu_alpha": about.swiglu_alpha, "swiglu_limit": about.swiglu_limit}
    p = load_config({"parallel": dict(parallel)}).parallel
    theirs = {
        "tensor_parallel_size": (p.tensor_parallel_size > 1, "1"),
        "placement": (p.placement == "swap", "fixed"),
        "data_sharding": (p.data_sharding == "full", "none"),
    }
    for key, (refused, remedy) in theirs.items():
        if refused:
            raise ConfigError(
                f"parallel.{key} is for twinmoe's own loop, not for blocks inside another; set it to {remedy}"
            )
    model = {"hidden_size": block.width, "num_attention_heads": 1}
    return load_config({"model": model, "moe": moe, "parallel": dict(parallel)})
