"""Exact numbers: what every rank must agree on is an integer or a fraction, never a float."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def exact(value: str | int | Fraction) -> Fraction:
    """The rational that a config string such as "1.3" or "13/10" names. ValueError for floats and other text."""
    if isinstance(value, (str, int, Fraction)):
        try:
            return Fraction(value)
        except (ValueError, ZeroDivisionError):
            pass
    raise ValueError(f'{value!r} is not an exact number; write it as text, such as "1.3" or "13/10"')


def ceil_ratio(factor: Fraction, total: int, parts: int) -> int:
    """ceil(factor x total / parts) in integers."""
    return -(-factor.numerator * total // (factor.denominator * parts))


def imbalance(load_R: np.ndarray) -> Fraction:
    """max / mean of non-negative loads; 1 where there is no load."""
    total = int(load_R.sum())
    return Fraction(int(load_R.max()) * len(load_R), total) if total else Fraction(1)


def node_array(node_of: tuple[int, ...] | None, ranks: int) -> np.ndarray:
    """(R,) node of each rank, all the same for None; ValueError if node_of names another number of ranks."""
    if node_of is None:
        return np.zeros(ranks, np.int64)
    if len(node_of) != ranks:
        raise ValueError(f"node_of names {len(node_of)} ranks, the group has {ranks}; give one node per rank")
    return np.array(node_of, np.int64)
