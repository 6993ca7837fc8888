"""Device helpers that every grouped kernel shares: which tile, which rows, which expert."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swizzle(tile, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a tile when GROUP consecutive rows walk through all columns together (L2 reuse)."""
    width = GROUP * columns
    first = (tile // width) * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = tile % width
    return first + inside % height, inside // height


@triton.jit
def row_tile(tiles_ptr, index):
    """(expert, first row, end of the expert's rows) of entry `index` of a row-tile table."""
    base = tiles_ptr + index * 4
    return tl.load(base), tl.load(base + 1), tl.load(base + 2)


@triton.jit
def half(x, WHICH: tl.constexpr):
    """Left (0) or right (1) half of the columns of x, without leaving registers."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1] // 2
    left, right = x.reshape(rows, 2, width).permute(0, 2, 1).split()
    return right if WHICH else left


@triton.jit
def piece(x, INDEX: tl.constexpr, PIECES: tl.constexpr):
    """Columns [INDEX, INDEX + 1) / PIECES of x; PIECES is 1, 2, 4 or 8."""
    if PIECES == 1:
        return x
    elif PIECES == 2:
        return half(x, INDEX)
    elif PIECES == 4:
        return half(half(x, INDEX // 2), INDEX % 2)
    else:
        return half(half(half(x, INDEX // 4), INDEX // 2 % 2), INDEX % 2)


@triton.jit
def silu_parts(gate):
    """sigmoid(gate) and gate * sigmoid(gate)."""
    s = 1.0 / (1.0 + tl.exp(-gate))
    return s, gate * s


@triton.jit
def gelu(h):
    """Exact GELU: h * Phi(h)."""
    return h * 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def gelu_slope(h):
    """Derivative of exact GELU: Phi(h) + h * phi(h)."""
    return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
