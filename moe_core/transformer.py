"""A pre-norm decoder block's parts as pure functions: norm, rotary attention, feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..backends.protocol import Array, Ops, Parameter
from .config import ModelConfig
from .parameters import Init, draw_dense
from .routing.base import times

Params = Mapping[str, Array]


@dataclass(frozen=True)
class Declare:
    """Makes the dense parameters of one component: names under a prefix, values keyed by the seed."""

    prefix: str
    seed: int

    def __call__(
        self, name: str, shape: tuple[int, ...], init: Init, decay: bool = True, master: bool = False
    ) -> Parameter:
        full = self.prefix + name
        return Parameter(full, shape, draw_dense(self.seed, full, shape, init), weight_decay=decay, master=master)

    def norm(self, name: str, width: int) -> Parameter:
        return self(name, (width,), "ones", decay=False, master=True)


def head_dim(model: ModelConfig) -> int:
    return model.attention_head_dim or model.hidden_size // model.num_attention_heads


def output_std(model: ModelConfig) -> float:
    """Standard deviation of matrices that write to the residual stream (GPT-2's depth scaling)."""
    return model.init_std / float(np.sqrt(2 * model.num_layers))


def attention_parameters(model: ModelConfig, declare: Declare) -> list[Parameter]:
    width, dim, std = model.hidden_size, head_dim(model), model.init_std
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads
    made = [
        declare("w_q", (width, heads * dim), std),
        declare("w_k", (width, kv_heads * dim), std),
        declare("w_v", (width, kv_heads * dim), std),
        declare("w_o", (heads * dim, width), output_std(model)),
    ]
    if model.attention_bias:
        made += [
            declare(f"b_{n}", (h * dim,), "zeros", decay=False) for n, h in zip("qkv", (heads, kv_heads, kv_heads))
        ]
    if model.attention_output_bias:
        made.append(declare("b_o", (width,), "zeros", decay=False))
    if model.attention_sinks:
        made.append(declare("sinks", (heads,), std, decay=False))
    if model.qk_norm:
        q_width, k_width = (heads * dim, kv_heads * dim) if model.qk_norm == "whole" else (dim, dim)
        made += [declare.norm("norm_q", q_width), declare.norm("norm_k", k_width)]
    return made


def rotary_frequencies(model: ModelConfig) -> tuple[np.ndarray, float]:
    """(A/2,) radians per position, and what cos and sin are multiplied by (YaRN, arXiv:2309.00071, eqs. 17-22).

    A pair of coordinates that turns more than beta_fast times over the original length keeps its frequency, one that
    turns fewer than beta_slow times has it divided by the factor; between them a ramp over the pair's number mixes.
    """
    dim, theta, scaling = head_dim(model), model.rope_theta, model.rope_scaling
    frequency = theta ** (-np.arange(0, dim, 2) / dim)
    if scaling is None:
        return frequency, 1.0
    low, high = (
        dim * np.log(scaling.original_length / (turns * 2 * np.pi)) / (2 * np.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 1e-3), 0, 1)
    scale = scaling.attention_factor
    if scale is None:
        scale = 0.1 * float(np.log(scaling.factor)) + 1.0 if scaling.factor > 1 else 1.0
    return frequency * (1 - ramp) + frequency / scaling.factor * ramp, scale


@dataclass(frozen=True)
class Rotary:
    """cos and sin (1, L, 1, A) of the rotary embedding, on the device."""

    cos: Array
    sin: Array

    @classmethod
    def make(cls, ops: Ops, length: int, model: ModelConfig, dtype: str) -> Rotary:
        frequency, scale = rotary_frequencies(model)
        angle = np.arange(length)[:, None] * frequency[None]
        angle = np.concatenate([angle, angle], 1)[None, :, None, :]
        wide = np.float64 if dtype == "float64" else np.float32
        cos, sin = (scale * turn(angle) for turn in (np.cos, np.sin))
        return cls(ops.asarray(cos.astype(wide)), ops.asarray(sin.astype(wide)))

    def rotate(self, ops: Ops, x_SLHA: Array) -> Array:
        return ops.rotary(x_SLHA, self.cos, self.sin)


def attention(ops: Ops, model: ModelConfig, p: Params, x_SLD: Array, rotary: Rotary, allowed: Array | None) -> Array:
    """Grouped-query attention with rotary positions; optional biases, sinks, and norms of q and k.

    The output's bias is left to the caller, who may have to add up parts first.
    """
    sequences, length, width = x_SLD.shape
    dim, heads = head_dim(model), model.num_attention_heads
    kv_heads = model.num_key_value_heads or heads
    x_TD = x_SLD.reshape((sequences * length, width))

    def project(name: str, count: int) -> Array:
        y = x_TD @ p[f"w_{name}"]
        y = y + p[f"b_{name}"] if model.attention_bias else y
        if model.qk_norm == "whole" and name != "v":
            y = ops.rms_norm(y, p[f"norm_{name}"], model.norm_eps)
        return y.reshape((sequences, length, count, dim))

    q, k, v = project("q", heads), project("k", kv_heads), project("v", kv_heads)
    if model.qk_norm is True:
        q, k = ops.rms_norm(q, p["norm_q"], model.norm_eps), ops.rms_norm(k, p["norm_k"], model.norm_eps)
    q, k = rotary.rotate(ops, q), rotary.rotate(ops, k)
    sinks = p["sinks"] if model.attention_sinks else None
    y = ops.attention(q, k, v, allowed) if sinks is None else sink_attention(ops, q, k, v, sinks, allowed)
    return (y.reshape((sequences * length, heads * dim)) @ p["w_o"]).reshape((sequences, length, width))


SINK_WIDTH = 16
"""Coordinates that carry the sinks: one would do, but fused kernels want widths that are multiples of 16."""


def sink_attention(
    ops: Ops, q_SLHA: Array, k_SLHA: Array, v_SLHA: Array, sinks_H: Array, allowed: Array | None
) -> Array:
    """Attention whose softmax has one more term exp(sink_h), without a value.

    The term is a position before the first, which everyone sees: its key is a unit vector in a coordinate of its own,
    where every query holds the sink and every other key zero; its value is zero. allowed: (S, L + 1, L + 1), that
    position included (None: causal).
    """
    sequences, length, _, dim = q_SLHA.shape
    wide, dtype = dim + SINK_WIDTH, ops.dtype_of(q_SLHA)

    def constant(shape: tuple[int, ...], place: int | None = None, value: float = 0.0) -> Array:
        array = np.zeros(shape, np.float64 if dtype == "float64" else np.float32)
        if place is not None:
            array[..., place] = value
        return ops.cast(ops.asarray(array), dtype)

    def extended(x_SLHA: Array, first: Array) -> Array:
        inside = ops.concat([x_SLHA, constant((sequences, length, x_SLHA.shape[2], SINK_WIDTH))], -1)
        return ops.concat([first, inside], 1)

    # the kernel divides scores by the root of the width that it sees
    own = constant((sequences, length, 1, SINK_WIDTH), 0, wide**0.5) * sinks_H.reshape((1, 1, -1, 1))
    q = ops.concat([times(ops, q_SLHA, (wide / dim) ** 0.5), own], -1)
    q = ops.concat([constant((sequences, 1, q.shape[2], wide)), q], 1)
    before = (sequences, 1, k_SLHA.shape[2], wide)
    y = ops.attention(q, extended(k_SLHA, constant(before, dim, 1.0)), extended(v_SLHA, constant(before)), allowed)
    y = ops.split(y, [1, length], 1)[1]
    return ops.split(y, [dim, SINK_WIDTH], -1)[0]


def mlp_parameters(
    name: str, width: int, hidden: int, activation: str, stds: tuple[float, float], declare: Declare
) -> list[Parameter]:
    up = hidden if activation == "gelu" else 2 * hidden
    return [declare(f"{name}_up", (1, width, up), stds[0]), declare(f"{name}_down", (1, hidden, width), stds[1])]


def mlp(ops: Ops, activation: str, w_up: Array, w_down: Array, x_TD: Array) -> Array:
    """A dense feed-forward: an expert layer of one expert (the stacks have a leading axis of one)."""
    return ops.expert_mlp(x_TD, w_up, w_down, ops.asarray(np.array([x_TD.shape[0]])), activation)  # type: ignore[arg-type]


def scoped(params: Params, prefix: str) -> dict[str, Array]:
    """The parameters below a prefix, by their short names."""
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}


SharedExperts = Callable[[Params, Array], Array]
