"""Are two computations the same bit for bit? Digests of what they showed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from ..backends.protocol import Communicator, Group


def digest_of(results: Sequence[Any]) -> str:
    """SHA-256 of everything in dataclasses, mappings, sequences, arrays and numbers; -0.0 is not 0.0.

    What has no bits of its own (names of parameters, functions) does not count.
    """
    digest = hashlib.sha256()
    for result in results:
        for field in fields(result):
            _add(digest, field.name, getattr(result, field.name))
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _add(digest, f"{name}/{key}", value[key])
    elif isinstance(value, (np.ndarray, float, int)):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())


def digests_of_all(digests: Sequence[str], comm: Communicator, world: Group) -> list[str]:
    """One for each place in the list, over all ranks; the same on every rank. Collective."""
    if not digests:
        return []
    mine = np.array([list(bytes.fromhex(d)) for d in digests], np.int64)
    everyone = comm.gather_to_host(mine, world).astype(np.uint8)
    return [hashlib.sha256(everyone[:, i].tobytes()).hexdigest() for i in range(len(digests))]


def differing(first: Sequence[Sequence[str]], second: Sequence[Sequence[str]]) -> list[str]:
    """Names whose digests differ between two lists of (name, digest); a name that only one has differs too."""
    if [name for name, _ in first] != [name for name, _ in second]:
        return ["the two runs did not compute the same cases"]
    return [name for (name, a), (_, b) in zip(first, second) if a != b]
