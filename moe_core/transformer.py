"""A pre-norm decoder block's parts as pure functions: norm, rotary attention, feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..backends.protocol import Array, Ops, Parameter
from .config import ModelConfig
from .parameters import Init, draw_dense

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
    if model.qk_norm:
        made += [declare.norm("norm_q", dim), declare.norm("norm_k", dim)]
    return made


@dataclass(frozen=True)
class Rotary:
    """cos and sin (1, L, 1, A) of the rotary embedding, on the device."""

    cos: Array
    sin: Array

    @classmethod
    def make(cls, ops: Ops, length: int, dim: int, theta: float, dtype: str) -> Rotary:
        angle = np.arange(length)[:, None] * theta ** (-np.arange(0, dim, 2) / dim)[None]
        angle = np.concatenate([angle, angle], 1)[None, :, None, :]
        wide = np.float64 if dtype == "float64" else np.float32
        return cls(ops.asarray(np.cos(angle).astype(wide)), ops.asarray(np.sin(angle).astype(wide)))

    def rotate(self, ops: Ops, x_SLHA: Array) -> Array:
        half = x_SLHA.shape[-1] // 2
        first, second = ops.split(x_SLHA, [half, half], -1)
        turned = x_SLHA * self.cos + ops.concat([second * -1.0, first], -1) * self.sin
        return ops.cast(turned, ops.dtype_of(x_SLHA))


def attention(ops: Ops, model: ModelConfig, p: Params, x_SLD: Array, rotary: Rotary, allowed: Array | None) -> Array:
    """Grouped-query attention with rotary positions; optional biases and norms of q and k."""
    sequences, length, width = x_SLD.shape
    dim, heads = head_dim(model), model.num_attention_heads
    kv_heads = model.num_key_value_heads or heads
    x_TD = x_SLD.reshape((sequences * length, width))

    def project(name: str, count: int) -> Array:
        y = x_TD @ p[f"w_{name}"]
        y = y + p[f"b_{name}"] if model.attention_bias else y
        return y.reshape((sequences, length, count, dim))

    q, k, v = project("q", heads), project("k", kv_heads), project("v", kv_heads)
    if model.qk_norm:
        q, k = ops.rms_norm(q, p["norm_q"], model.norm_eps), ops.rms_norm(k, p["norm_k"], model.norm_eps)
    y = ops.attention(rotary.rotate(ops, q), rotary.rotate(ops, k), v, allowed)
    return (y.reshape((sequences * length, heads * dim)) @ p["w_o"]).reshape((sequences, length, width))


def mlp_parameters(
    name: str, width: int, hidden: int, activation: str, stds: tuple[float, float], declare: Declare
) -> list[Parameter]:
    up = 2 * hidden if activation == "swiglu" else hidden
    return [declare(f"{name}_up", (1, width, up), stds[0]), declare(f"{name}_down", (1, hidden, width), stds[1])]


def mlp(ops: Ops, activation: str, w_up: Array, w_down: Array, x_TD: Array) -> Array:
    """A dense feed-forward: an expert layer of one expert (the stacks have a leading axis of one)."""
    return ops.expert_mlp(x_TD, w_up, w_down, ops.asarray(np.array([x_TD.shape[0]])), activation)  # type: ignore[arg-type]


def scoped(params: Params, prefix: str) -> dict[str, Array]:
    """The parameters below a prefix, by their short names."""
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}


SharedExperts = Callable[[Params, Array], Array]
