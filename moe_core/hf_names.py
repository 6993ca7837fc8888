"""Which tensor of a Hugging Face checkpoint is which of ours, and how one becomes the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .config import Config
from .hf_families import Family

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """A tensor of theirs (or entry `row` of its first axis) and the part of ours that it holds.

    turned: (out, in) there. half: 0 gate columns, 1 linear columns of ours. woven: both there, alternating. stack:
    ours has a leading axis of one.
    """

    theirs: str
    ours: str
    turned: bool = False
    row: int | None = None
    half: int | None = None
    woven: bool = False
    stack: bool = False


def links(family: Family, config: Config) -> Iterator[Link]:
    """Every tensor of theirs, in the order of the layers."""
    model = config.model
    yield Link("model.embed_tokens.weight", "vocabulary.w_embedding")
    for index in range(model.num_layers):
        yield from _layer(family, config, index)
    yield Link("model.norm.weight", "vocabulary.norm")
    if not model.tie_embeddings:
        yield Link("lm_head.weight", "vocabulary.w_head", turned=True)


def _layer(family: Family, config: Config, index: int) -> Iterator[Link]:
    model = config.model
    theirs, ours = f"model.layers.{index}.", f"layers.{index}."
    yield Link(theirs + "input_layernorm.weight", ours + "norm_1")
    yield Link(theirs + "post_attention_layernorm.weight", ours + "norm_2")
    for n in "qkvo":
        yield Link(f"{theirs}self_attn.{n}_proj.weight", f"{ours}attention.w_{n}", turned=True)
        if model.attention_output_bias if n == "o" else model.attention_bias:
            yield Link(f"{theirs}self_attn.{n}_proj.bias", f"{ours}attention.b_{n}")
    for n in "qk" if model.qk_norm else "":
        yield Link(f"{theirs}self_attn.{n}_norm.weight", f"{ours}attention.norm_{n}")
    if model.attention_sinks:
        yield Link(theirs + "self_attn.sinks", ours + "attention.sinks")
    if index < model.num_dense_layers:
        yield from _mlp(f"{theirs}mlp.", f"{ours}mlp.w", stack=True)
        return
    yield from _moe(family, config, theirs + family.moe, ours + "moe.")


def _moe(family: Family, config: Config, theirs: str, ours: str) -> Iterator[Link]:
    moe = config.moe
    yield Link(f"{theirs}{family.router}.weight", ours + "w_router", turned=True)
    if moe.router_bias:
        yield Link(f"{theirs}{family.router}.bias", ours + "b_router")
    for e in range(moe.num_experts):
        mine = f"{ours}experts.{e}."
        if family.stacked:
            yield Link(theirs + "experts.gate_up_proj", mine + "w_up", row=e, woven=True)
            yield Link(theirs + "experts.gate_up_proj_bias", mine + "b_up", row=e, woven=True)
            yield Link(theirs + "experts.down_proj", mine + "w_down", row=e)
            yield Link(theirs + "experts.down_proj_bias", mine + "b_down", row=e)
        else:
            yield from _mlp(f"{theirs}experts.{e}.", mine + "w", family.matrices)
    if moe.num_shared_experts:
        yield from _mlp(theirs + "shared_expert.", ours + "w_shared", stack=True)
    if moe.shared_expert_gate:
        yield Link(theirs + "shared_expert_gate.weight", ours + "w_shared_gate", turned=True)


def _mlp(
    theirs: str, ours: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), stack: bool = False
) -> Iterator[Link]:
    gate, up, down = (f"{theirs}{name}.weight" for name in names)
    yield Link(gate, ours + "_up", turned=True, half=0, stack=stack)
    yield Link(up, ours + "_up", turned=True, half=1, stack=stack)
    yield Link(down, ours + "_down", turned=True, stack=stack)


def piece_shape(link: Link, ours: Shape) -> Shape:
    """Shape there of what the link holds (of one entry, where it is a row)."""
    shape = ours[1:] if link.stack else ours
    if link.half is not None:
        shape = (*shape[:-1], shape[-1] // 2)
    return shape[::-1] if link.turned else shape


def to_theirs(link: Link, value: np.ndarray) -> np.ndarray:
    """What the link holds of one of our tensors, in their layout."""
    value = value[0] if link.stack else value
    width = value.shape[-1] // 2
    if link.half is not None:
        value = value[..., link.half * width : (link.half + 1) * width]
    if link.woven:
        woven = np.empty_like(value)
        woven[..., ::2], woven[..., 1::2] = value[..., :width], value[..., width:]
        value = woven
    return value.T if link.turned else value


def to_ours(parts: Sequence[tuple[Link, np.ndarray]], shape: Shape) -> np.ndarray:
    """One of our tensors from all the links that hold a part of it."""
    values = []
    for link, value in parts:
        value = value.T if link.turned else value
        if link.woven:
            value = np.concatenate([value[..., ::2], value[..., 1::2]], -1)
        values.append(value)
    whole = values[0] if len(values) == 1 else np.concatenate(values, -1)
    return np.ascontiguousarray(whole).reshape(shape)


def by_ours(found: Sequence[Link]) -> dict[str, list[Link]]:
    """Links by our names, halves in order."""
    grouped: dict[str, list[Link]] = {}
    for link in found:
        grouped.setdefault(link.ours, []).append(link)
    return {name: sorted(group, key=lambda link: link.half or 0) for name, group in grouped.items()}


def by_theirs(found: Sequence[Link]) -> dict[str, list[Link]]:
    """Links by their names, rows in order."""
    grouped: dict[str, list[Link]] = {}
    for link in found:
        grouped.setdefault(link.theirs, []).append(link)
    return grouped


def their_shape(group: Sequence[Link], shapes: Mapping[str, Shape]) -> Shape:
    """Shape of one tensor of theirs."""
    piece = piece_shape(group[0], shapes[group[0].ours])
    return piece if group[0].row is None else (len(group), *piece)
