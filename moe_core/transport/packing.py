"""Small integers of a row in few 64-bit words: digits of a number whose base is the number of values."""

from __future__ import annotations

from math import ceil

from ...backends.protocol import Array, Ops


def digits(values: int) -> int:
    """How many digits 0..values (the last one for 'none') fit in a word. ValueError if not even one does."""
    count = 0
    while (values + 1) ** (count + 1) < 2**63:
        count += 1
    if count == 0:
        raise ValueError(f"{values} slots do not fit a 64-bit word; use fewer slots")
    return count


def words(columns: int, values: int) -> int:
    """Words per row of `columns` integers in -1..values-1."""
    return ceil(columns / digits(values))


def pack(ops: Ops, x_NK: Array, values: int) -> Array:
    """(N, words) of integers (N, K) in -1..values-1."""
    columns = ops.split(x_NK, [1] * x_NK.shape[1], 1)
    width, packed = digits(values), []
    for start in range(0, len(columns), width):
        word = columns[start] + 1
        for column in columns[start + 1 : start + width]:
            word = word * (values + 1) + (column + 1)
        packed.append(word)
    return ops.concat(packed, 1)


def unpack(ops: Ops, packed_NW: Array, columns: int, values: int) -> Array:
    """Inverse of `pack`."""
    width, found = digits(values), []
    for word, start in zip(ops.split(packed_NW, [1] * packed_NW.shape[1], 1), range(0, columns, width), strict=True):
        inside: list[Array] = []
        for _ in range(min(width, columns - start)):
            inside.append(word % (values + 1) - 1)
            word = word // (values + 1)
        found += reversed(inside)
    return ops.concat(found, 1)
