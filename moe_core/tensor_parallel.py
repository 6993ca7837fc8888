"""Columns and rows of matrices spread over a tensor-parallel group, whose ranks hold the same tokens.

Every rank of the group counts 1/t of the loss (`share_of_loss`), so that gradients are sums over all ranks like any
others: what a rank computes from its columns alone is a part, and `all_reduce` is its own adjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..backends.protocol import Array, Communicator, Group, Ops, Parameter, Piece
from .config import ModelConfig, MoeConfig
from .parameters import take_part
from .plan import Plan
from .residency.base import Residency
from .routing.base import Routing
from .transport.base import Exchange, Transport
from .transport.hierarchical import BYTES

TOKEN = "token"
"""Group of the ranks that hold the same part of a split matrix: they differ in their tokens."""
EXPERT_TENSOR = "expert_tensor"
"""Group of the ranks that hold disjoint parts of the experts."""


def share_of_loss(tensor: Group) -> float:
    """What a rank's loss is multiplied by, before its gradient."""
    return 1.0 / tensor.size


def split_parameter(parameter: Parameter, tensor: Group, axis: int, blocks: int = 1) -> Parameter:
    """This rank's part of a dense matrix, cut along `axis` (in each of `blocks` equal runs of it)."""
    if tensor.size == 1:
        return parameter
    part = _part(Piece(parameter.name, parameter.shape), tensor, axis, blocks)
    shape = _cut_shape(parameter.shape, tensor, axis)
    return replace(
        parameter,
        shape=shape,
        initial=_cut_values(parameter.initial, part),
        reduce_over=TOKEN,
        norm_over=tensor.name,
        part=part,
    )


def split_stack(parameter: Parameter, tensor: Group, axis: int, blocks: int = 1) -> Parameter:
    """This rank's part of a stack of experts; `axis` is one of an expert's matrix."""
    if tensor.size == 1:
        return parameter
    pieces = tuple(_part(piece, tensor, axis, blocks) for piece in parameter.pieces)
    cut = _part(Piece(parameter.name, parameter.shape), tensor, axis + 1, blocks)
    return replace(
        parameter,
        shape=_cut_shape(parameter.shape, tensor, axis + 1),
        initial=_cut_values(parameter.initial, cut),
        norm_over=EXPERT_TENSOR,
        pieces=pieces,
    )


def _part(piece: Piece, tensor: Group, axis: int, blocks: int) -> Piece:
    size = piece.shape[axis]
    if size % (blocks * tensor.size):
        raise ValueError(
            f"{piece.name}: {size // blocks} columns or rows can't be shared equally by tensor_parallel_size="
            f"{tensor.size}; choose a size that divides heads and hidden sizes"
        )
    width = size // blocks // tensor.size
    return replace(piece, start=tensor.index * width, stop=(tensor.index + 1) * width, axis=axis, blocks=blocks)


def _cut_shape(shape: tuple[int, ...], tensor: Group, axis: int) -> tuple[int, ...]:
    return tuple(n // tensor.size if i == axis else n for i, n in enumerate(shape))


def _cut_values(initial: Callable[[], np.ndarray], part: Piece) -> Callable[[], np.ndarray]:
    return lambda: take_part(initial(), part)


def gate_blocks(activation: str) -> int:
    """Gate and linear columns of a swiglu matrix are cut alike."""
    return 1 if activation == "gelu" else 2


def split_mlp(made: list[Parameter], tensor: Group, activation: str) -> list[Parameter]:
    """Up and down matrices of a dense feed-forward (stacks of one): the first by columns, the second by rows."""
    up, down = made
    return [split_parameter(up, tensor, 2, gate_blocks(activation)), split_parameter(down, tensor, 1)]


def split_attention(made: list[Parameter], tensor: Group) -> list[Parameter]:
    """Attention's parameters with whole heads on each rank: q, k, v by columns, the output by rows."""

    def split(parameter: Parameter) -> Parameter:
        short = parameter.name.rpartition(".")[2]
        if short in ("w_q", "w_k", "w_v"):
            return split_parameter(parameter, tensor, 1)
        return split_parameter(parameter, tensor, 0) if short in ("w_o", "b_q", "b_k", "b_v", "sinks") else parameter

    return [split(parameter) for parameter in made]


def part_of_attention(model: ModelConfig, tensor: Group) -> ModelConfig:
    """The attention that one tensor rank computes: its share of the heads."""
    if tensor.size == 1:
        return model
    kv_heads = model.num_key_value_heads or model.num_attention_heads
    share = {
        "num_attention_heads": model.num_attention_heads // tensor.size,
        "num_key_value_heads": kv_heads // tensor.size,
        "attention_head_dim": model.attention_head_dim or model.hidden_size // model.num_attention_heads,
    }
    return model.model_copy(update=share)


def summed_over_tensor(comm: Communicator, tensor: Group, part: Array) -> Array:
    """The sum of the group's parts, on each of its ranks."""
    return part if tensor.size == 1 else comm.all_reduce(part, tensor)


def part_of_experts(moe: MoeConfig, tensor: Group) -> MoeConfig:
    """The layer as one tensor rank computes it."""
    if tensor.size == 1:
        return moe
    return moe.model_copy(update={"expert_hidden_size": moe.expert_hidden_size // tensor.size})


class SplitExperts:
    """A residency whose experts are cut over the tensor group: w_up by columns, w_down by rows.

    whole: declares the uncut stacks; inner: computes with the parts. Outputs are parts of sums over the group.
    """

    def __init__(self, whole: Residency, inner: Residency, tensor: Group, activation: str) -> None:
        self._whole, self._inner, self._tensor, self._activation = whole, inner, tensor, activation

    def parameters(self, prefix: str, std_down: float) -> tuple[Parameter, ...]:
        blocks = {f"{prefix}w_up": (1, gate_blocks(self._activation)), f"{prefix}w_down": (0, 1)}
        return tuple(split_stack(p, self._tensor, *blocks[p.name]) for p in self._whole.parameters(prefix, std_down))

    def gather(self, params: Mapping[str, Array], plan: Plan | None) -> Any:
        return self._inner.gather(params, plan)

    def arrived(self, weights: Any) -> Any:
        return self._inner.arrived(weights)

    def compute(self, weights: Any, rows_ND: Array, exchange: Exchange, plan: Plan | None) -> Array:
        return self._inner.compute(weights, rows_ND, exchange, plan)


def all_reduce_bytes(size: int, ranks: int) -> int:
    """What a rank sends in an all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
    return 2 * (ranks - 1) * size // ranks


class SummedOverTensor:
    """A transport that carries whole rows on every tensor rank; the token's output is summed over the group."""

    def __init__(self, inner: Transport, ops: Ops, comm: Communicator, tensor: Group) -> None:
        self._inner, self._ops, self._comm, self._tensor = inner, ops, comm, tensor

    def dispatch(self, x_TD: Array, routing: Routing, plan: Plan | None) -> tuple[Array, Exchange]:
        rows_ND, exchange = self._inner.dispatch(x_TD, routing, plan)
        whole = x_TD.shape[0] * x_TD.shape[1] * BYTES[self._ops.dtype_of(x_TD)]
        return rows_ND, replace(exchange, tensor_bytes=(0, all_reduce_bytes(whole, self._tensor.size)))

    def combine(self, rows_ND: Array, weights_TK: Array, exchange: Exchange) -> Array:
        return self._comm.all_reduce(self._inner.combine(rows_ND, weights_TK, exchange), self._tensor)
