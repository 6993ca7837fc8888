"""First values of parameters, the same for every layout: drawn by NumPy, keyed by what they are, not by where."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from ..backends.protocol import Piece

ROW_BLOCK = 64
"""Rows of a matrix that one generator draws."""

Init = float | str
"""Standard deviation of a normal draw, or 'ones' or 'zeros'."""


def draw(seed: int, name: str, shape: Sequence[int], init: Init, expert: int | None = None) -> np.ndarray:
    """One whole tensor (float64) keyed by (seed, name, logical expert, row block)."""
    if init in ("ones", "zeros"):
        return np.full(shape, 1.0 if init == "ones" else 0.0)
    out = np.empty(shape)
    for start in range(0, shape[0], ROW_BLOCK):
        key = f"{seed}/{name}/{'' if expert is None else expert}/{start // ROW_BLOCK}"
        entropy = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
        block = out[start : start + ROW_BLOCK]
        block[...] = np.random.Generator(np.random.Philox(entropy)).standard_normal(block.shape)
    return out * float(init)


def draw_dense(seed: int, name: str, shape: Sequence[int], init: Init) -> Callable[[], np.ndarray]:
    """`Parameter.initial` of a tensor that the rank stores whole."""
    return lambda: draw(seed, name, shape, init)


def draw_experts(
    seed: int, name: str, experts: Sequence[int], shape: Sequence[int], init: Init
) -> Callable[[], np.ndarray]:
    """`Parameter.initial` of a stack (len(experts), *shape) of logical experts."""

    def initial() -> np.ndarray:
        if not len(experts):
            return np.zeros((0, *shape))
        return np.stack([draw(seed, name, shape, init, expert=int(e)) for e in experts])

    return initial


def take_part(whole: np.ndarray, piece: Piece) -> np.ndarray:
    """The elements that a piece with an axis names."""
    assert piece.axis is not None
    assert piece.stop is not None
    run = whole.shape[piece.axis] // piece.blocks
    inside = np.arange(piece.start, piece.stop)
    index = (np.arange(piece.blocks)[:, None] * run + inside).reshape(-1)
    return np.take(whole, index, piece.axis)


def join_parts(parts: list[np.ndarray], axis: int, blocks: int) -> np.ndarray:
    """The whole from all its parts in order: the inverse of `take_part`."""
    runs = [np.split(part, blocks, axis) for part in parts]
    return np.concatenate([run[b] for b in range(blocks) for run in runs], axis)
