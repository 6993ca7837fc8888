"""Random numbers that depend on what they are for, not on where they are drawn."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*key: object) -> np.random.Generator:
    """A generator keyed by the parts of `key`."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


def balanced_table(num_ids: int, num_experts: int, top_k: int, *key: object) -> np.ndarray:
    """(num_ids, top_k) experts of each id: every column gives each expert the same number of ids (or one more).

    A row's experts are distinct. Balanced by ids, not by how often they occur (PanGu-Sigma's random routing).
    """
    draw = generator(*key)
    place = draw.permutation(num_ids)
    shifts = np.concatenate([[0], 1 + draw.permutation(num_experts - 1)[: top_k - 1]]).astype(np.int64)
    return (place[:, None] + shifts[None]) % num_experts


def uniform_noise(shape: tuple[int, int], eps: float, *key: object) -> np.ndarray:
    """Factors in [1 - eps, 1 + eps)."""
    return 1.0 + eps * (2.0 * generator(*key).random(shape) - 1.0)
