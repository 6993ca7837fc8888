"""The decoder: embedding, blocks (attention, then a dense feed-forward or an MoE layer), head and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..backends.protocol import Array, Component, Ops, Parameter
from .build import LayerParts, LayerSpec, Runtime, build_layer
from .config import Config
from .data import GlobalBatch
from .heads import HeadExchange, HeadsLayer
from .layer import LayerStats, MoELayer
from .prefetch import link, set_out
from .routing.base import Memo, Router, State, Tokens, times
from .routing.losses import combine_layers, loss_coefficients
from .tensor_parallel import part_of_attention, share_of_loss, split_attention, split_mlp, summed_over_tensor
from .transformer import (
    Declare,
    Params,
    Rotary,
    attention,
    attention_parameters,
    mlp,
    mlp_parameters,
    output_std,
    scoped,
)


@dataclass(frozen=True)
class StepOutput:
    """Local contributions on the device (sums over ranks give the step's values) and the stats of each MoE layer."""

    cross_entropy: Array
    losses: Mapping[str, Array]
    stats: tuple[LayerStats, ...]


@dataclass(frozen=True)
class Inputs:
    """What every block of one forward pass shares."""

    tokens: Tokens
    rotary: Rotary
    allowed: Array | None
    allowed_near: Array | None = None
    """Inside the sliding window, for the layers that have one."""


@dataclass(frozen=True)
class Model:
    """Components for a trainer, and the loss as a function of the modules it makes of them."""

    config: Config
    ops: Ops
    components: tuple[Component, ...]
    moe_layers: tuple[int, ...]
    coefficients: Mapping[str, float] = field(default_factory=dict)
    routers: Mapping[int, Router] = field(default_factory=dict)
    heads: HeadExchange | None = None
    layers: Mapping[int, MoELayer | HeadsLayer] = field(default_factory=dict)
    share_of_loss: float = 1.0

    @property
    def parameters(self) -> dict[str, Parameter]:
        """All parameters of this rank by name."""
        return {p.name: p for component in self.components for p in component.parameters}

    def initial_router_states(self) -> dict[int, dict[str, np.ndarray]]:
        """What routers learn without gradients, by layer, before the first step."""
        return {index: router.initial_state() for index, router in self.routers.items()}

    def loss(
        self,
        modules: Mapping[str, Callable[..., Any]],
        batch: GlobalBatch,
        step: int = 0,
        training: bool = True,
        router_states: Mapping[int, State] | None = None,
    ) -> tuple[Array, StepOutput]:
        """This micro-batch's contribution to the loss of the whole optimizer step, and what it is made of."""
        states = self.initial_router_states() if router_states is None else router_states
        inputs = self._inputs(batch, step, training)
        x_SLD = modules["vocabulary"]("embed", self.ops.asarray(batch.tokens_SL.reshape(-1)), batch.tokens_SL.shape)
        auxiliary: dict[str, Array] = {}
        stats: list[LayerStats] = []
        memos = [Memo(states.get(index, {})) for index in range(self.config.model.num_layers)]
        if self.config.parallel.prefetch_layers:
            link([memos[i] for i in self.moe_layers], [modules[f"layers.{i}"] for i in self.moe_layers], inputs)
        for index, memo in enumerate(memos):
            x_SLD, losses, seen = self._block(modules[f"layers.{index}"], x_SLD, inputs, memo)
            stats += [] if seen is None else [seen]
            for name, value in losses.items():
                auxiliary[name] = auxiliary[name] + value if name in auxiliary else value
        cross_entropy = modules["vocabulary"]("loss", x_SLD, batch)
        loss = cross_entropy
        auxiliary = combine_layers(self.ops, self.config.moe, auxiliary, inputs.tokens.total, inputs.tokens.layers)
        coefficients = loss_coefficients(self.config.moe, step)
        for name, value in auxiliary.items():
            loss = loss + times(self.ops, value, coefficients.get(name, 1.0))
        loss = times(self.ops, loss, self.share_of_loss)
        return loss, StepOutput(
            self.ops.stop_gradient(cross_entropy),
            {name: self.ops.stop_gradient(value) for name, value in auxiliary.items()},
            tuple(stats),
        )

    def _block(
        self, module: Callable[..., Any], x_SLD: Array, inputs: Inputs, memo: Memo
    ) -> tuple[Array, dict[str, Array], Any]:
        if self.config.train.recompute != "layer":
            return module(x_SLD, inputs, memo)
        return self.ops.checkpoint(lambda x: module(x, inputs, memo), x_SLD)

    def _inputs(self, batch: GlobalBatch, step: int, training: bool) -> Inputs:
        model, ops = self.config.model, self.ops
        real = None if batch.real_SL.all() else ops.asarray(batch.real_SL.reshape(-1))
        tokens = Tokens(
            sequences=batch.tokens_SL.shape[0],
            total=float(batch.total_tokens),
            layers=max(1, len(self.moe_layers)),
            real_T=real,
            token_ids_T=ops.asarray(batch.tokens_SL.reshape(-1)),
            sequence_positions=batch.positions_S,
            global_sequences=self.config.train.global_batch_size,
            domains_S=batch.domain_S,
            step=step,
            training=training,
        )
        if self.heads is not None:
            tokens = replace(tokens, over_heads=self.heads.gather_tokens(tokens, batch.tokens_SL.size))
        length = batch.tokens_SL.shape[1]
        rotary = Rotary.make(ops, length, model, self.config.train.dtype)
        allowed = _allowed(ops, batch, None, model.attention_sinks)
        if model.sliding_window is None:
            return Inputs(tokens, rotary, allowed)
        return Inputs(tokens, rotary, allowed, _allowed(ops, batch, model.sliding_window, model.attention_sinks))


def _allowed(ops: Ops, batch: GlobalBatch, window: int | None, sinks: bool) -> Array | None:
    """Causal, inside one document and inside the window; None if that is causal alone. sinks: one more position,
    before the first, which everyone sees."""
    documents, length = batch.documents_SL, batch.documents_SL.shape[1]
    if (documents == documents[:, :1]).all() and (window is None or window >= length):
        return None
    back = np.arange(length)[:, None] - np.arange(length)
    seen = (back >= 0) & (back < (window or length))
    allowed = seen & (documents[:, :, None] == documents[:, None, :])
    if sinks:
        allowed = np.pad(allowed, ((0, 0), (1, 0), (1, 0)))
        allowed[:, :, 0] = True
    return ops.asarray(allowed)


def build_model(config: Config, runtime: Runtime) -> Model:
    """The components of `config` on this rank's place in the mesh."""
    model = config.model
    moe_layers = tuple(range(model.num_dense_layers, model.num_layers))
    parts = [_feed_forward(config, runtime, i, i in moe_layers) for i in range(model.num_layers)]
    blocks = [_build_block(config, runtime, i, part) for i, part in enumerate(parts)]
    layers = {i: part.layer for i, part in enumerate(parts) if isinstance(part, LayerParts)}
    routers = {i: layer.router for i, layer in layers.items()}
    components = (_build_vocabulary(config, runtime), *blocks)
    heads = next((layer.exchange for layer in layers.values() if isinstance(layer, HeadsLayer)), None)
    share = share_of_loss(runtime.groups["tensor"])
    return Model(
        config, runtime.ops, components, moe_layers, loss_coefficients(config.moe), routers, heads, layers, share
    )


def _build_vocabulary(config: Config, runtime: Runtime) -> Component:
    """Embedding, final norm, output head (tied or not) and cross-entropy: one component, called twice."""
    model, ops = config.model, runtime.ops
    declare = Declare("vocabulary.", config.train.seed)
    shape = (model.vocab_size, model.hidden_size)
    parameters = [declare("w_embedding", shape, model.init_std), declare.norm("norm", model.hidden_size)]
    if not model.tie_embeddings:
        parameters.append(declare("w_head", (model.hidden_size, model.vocab_size), model.init_std))

    def forward(params: Params, what: str, *inputs: Any) -> Array:
        p = scoped(params, declare.prefix)
        if what == "embed":
            ids_T, (sequences, length) = inputs
            return ops.take_rows(p["w_embedding"], ids_T).reshape((sequences, length, model.hidden_size))
        x_SLD, batch = inputs
        x_TD = ops.rms_norm(x_SLD.reshape((-1, model.hidden_size)), p["norm"], model.norm_eps)
        head = ops.transpose(p["w_embedding"], (1, 0)) if model.tie_embeddings else p["w_head"]
        targets = batch.targets_SL.reshape(-1)
        losses_T = ops.cross_entropy(x_TD @ head, ops.asarray(np.maximum(targets, 0)))
        total = ops.where(ops.asarray(targets >= 0), losses_T, 0.0).sum(-1)
        return times(ops, total, 1.0 / max(1, batch.total_targets))

    return Component("vocabulary", tuple(parameters), forward)


def _build_block(config: Config, runtime: Runtime, index: int, parts: LayerParts | Sequence[Parameter]) -> Component:
    """norm -> attention -> residual -> norm -> feed-forward -> residual; forward(x_SLD, Inputs, Memo).

    Without an x_SLD, weights of the call to come set out, and that is all.
    """
    model, ops = config.model, runtime.ops
    prefix = f"layers.{index}."
    declare = Declare(prefix + "attention.", config.train.seed)
    norms = Declare(prefix, config.train.seed)
    tensor, comm = runtime.groups["tensor"], runtime.comm
    own_heads = part_of_attention(model, tensor)
    parameters = split_attention(attention_parameters(model, declare), tensor)
    parameters.append(norms.norm("norm_1", model.hidden_size))
    parameters.append(norms.norm("norm_2", model.hidden_size))
    parameters += parts.parameters if isinstance(parts, LayerParts) else parts
    near = model.sliding_window is not None and (model.sliding_layers is None or index in model.sliding_layers)

    def forward(params: Params, x_SLD: Any, inputs: Inputs, memo: Memo) -> Any:
        p = scoped(params, prefix)
        if x_SLD is None:
            assert isinstance(parts, LayerParts)
            assert isinstance(parts.layer, MoELayer)
            return set_out(parts.layer, scoped(p, "moe."), memo)
        a_SLD = ops.rms_norm(x_SLD, p["norm_1"], model.norm_eps)
        allowed = inputs.allowed_near if near else inputs.allowed
        heads_SLD = attention(ops, own_heads, scoped(p, "attention."), a_SLD, inputs.rotary, allowed)
        x_SLD = x_SLD + summed_over_tensor(comm, tensor, heads_SLD)
        x_SLD = x_SLD + p["attention.b_o"] if model.attention_output_bias else x_SLD
        x_TD = ops.rms_norm(x_SLD, p["norm_2"], model.norm_eps).reshape((-1, model.hidden_size))
        if isinstance(parts, LayerParts):
            out = parts.layer(scoped(p, "moe."), x_TD, inputs.tokens, memo)
            return x_SLD + out.y.reshape(x_SLD.shape), out.losses, out.stats
        part_TD = mlp(ops, model.dense_activation, p["mlp.w_up"], p["mlp.w_down"], x_TD)
        y_TD = summed_over_tensor(comm, tensor, part_TD)
        return x_SLD + y_TD.reshape(x_SLD.shape), {}, None

    return Component(f"layers.{index}", tuple(parameters), forward)


def _feed_forward(config: Config, runtime: Runtime, index: int, is_moe: bool) -> LayerParts | Sequence[Parameter]:
    model, seed, prefix = config.model, config.train.seed, f"layers.{index}."
    if is_moe:
        recompute = config.train.recompute == "experts"
        stds = (model.init_std, output_std(model))
        spec = LayerSpec(model.hidden_size, prefix + "moe.", seed, *stds, recompute, index, model.vocab_size)
        return build_layer(config.moe, config.parallel, runtime, spec)
    hidden = model.dense_hidden_size or config.moe.expert_hidden_size * config.moe.top_k
    stds = (model.init_std, output_std(model))
    declare = Declare(prefix + "mlp.", seed)
    made = mlp_parameters("w", model.hidden_size, hidden, model.dense_activation, stds, declare)
    return split_mlp(made, runtime.groups["tensor"], model.dense_activation)
