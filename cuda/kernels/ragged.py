"""Tensor descriptors bounded by an expert's own rows: loads past the end read zeros, stores past it vanish.

The row axis appears three times. Addresses wrap around 2^64, so with coordinates (2^30, end, 2^30 - left + r), where
`end` is the first row past the expert and `left` the rows from the tile's first row to it, the strides
(2^34 - s, s, s) lead to row end - left + r, and the hardware's bound 2^30 on the third axis cuts at r = left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_LIMIT = 2**30
LIMIT = tl.constexpr(_LIMIT)


def ragged(x: torch.Tensor, box: Sequence[int]) -> TensorDescriptor:
    """Descriptor over x (rows, ...) with up to 3 axes for the functions below; ValueError from 2^30 rows on."""
    return TensorDescriptor(x, *ragged_layout(x), [1, 1, *box])


def ragged_layout(x: torch.Tensor) -> tuple[list[int], list[int]]:
    """(shape, strides) of such a descriptor. ValueError from 2^30 rows on."""
    if x.shape[0] > _LIMIT:
        raise ValueError(f"{x.shape[0]} rows exceed 2^30: split the batch into micro-batches")
    shape = [2**31 - 2**16, 2**31 - 2**16, _LIMIT, *x.shape[1:]]
    return shape, [2**34 - x.stride(0), x.stride(0), *x.stride()]


@triton.jit
def load_rows(desc, end, left, row, col, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Block (ROWS, COLUMNS) at (row, col) of a (rows, columns) tensor; row counts from end - left."""
    return desc.load([LIMIT, end, LIMIT - left + row, col]).reshape(ROWS, COLUMNS)


@triton.jit
def store_rows(desc, end, left, col, value):
    """Write value (ROWS, COLUMNS) at column col of the rows that start at end - left."""
    rows: tl.constexpr = value.shape[0]
    columns: tl.constexpr = value.shape[1]
    desc.store([LIMIT, end, LIMIT - left, col], value.to(desc.dtype).reshape(1, 1, rows, columns))


@triton.jit
def load_part(desc, end, left, part, col, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """As `load_rows` from (rows, parts, columns), one part, as float32."""
    return desc.load([LIMIT, end, LIMIT - left, part, col]).reshape(ROWS, COLUMNS).to(tl.float32)


@triton.jit
def store_part(desc, end, left, part, col, value):
    """As `store_rows` into (rows, parts, columns), one part."""
    rows: tl.constexpr = value.shape[0]
    columns: tl.constexpr = value.shape[1]
    desc.store([LIMIT, end, LIMIT - left, part, col], value.to(desc.dtype).reshape(1, 1, rows, 1, columns))
