"""Documents to sequences: the validation split, packing, and an order that is the same everywhere.

A domain's tokens are one array X: every document is a boundary token followed by its tokens, and one more
boundary closes the array. Reading X[p] to predict X[p + 1] makes every token of every document a target
exactly once, the closing boundary included, and no target crosses into another document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_CHUNK = 1 << 22
Pieces = tuple[np.ndarray, np.ndarray]
"""(starts, sizes) of ranges of positions."""


class TokenArray(Protocol):
    """A one-dimensional array of tokens, in memory, mapped, or put together where it is read."""

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> np.ndarray:
        """A slice, or the elements that integers name."""
        ...


@dataclass(frozen=True, eq=False)
class Domain:
    """Documents of one kind. tokens (N + 1,): X as above; starts (D + 1,): where documents begin, then N."""

    name: str
    tokens: np.ndarray | TokenArray
    starts: np.ndarray

    @classmethod
    def from_documents(cls, name: str, documents: list[np.ndarray], boundary: int) -> Domain:
        """Join documents (integer arrays); empty ones are left out."""
        return cls.from_batches(name, [documents], boundary)

    @classmethod
    def from_batches(
        cls, name: str, batches: Iterable[list[np.ndarray]], boundary: int, file: Path | None = None
    ) -> Domain:
        """Join documents that come in batches; file: where tokens go, to be mapped, instead of into memory."""
        dtype = np.dtype("<u2" if boundary < 1 << 16 else "<u4")
        mark, parts, sizes = np.array([boundary], dtype), [], []
        with nullcontext() if file is None else file.open("wb") as out:
            for batch in batches:
                kept = [d for d in batch if len(d)]
                sizes += [len(d) + 1 for d in kept]
                joined = np.concatenate([mark[:0], *(p for d in kept for p in (mark, d.astype(dtype, copy=False)))])
                parts.append(joined) if out is None else joined.tofile(out)
            parts.append(mark) if out is None else mark.tofile(out)
        tokens = np.concatenate(parts) if file is None else np.memmap(file, dtype, "r")
        return cls(name, tokens, np.cumsum([0, *sizes], dtype=np.int64))

    def digest(self) -> str:
        """SHA-256 (hex) of tokens and boundaries, whatever their width in memory."""
        state = hashlib.sha256(np.asarray(self.starts, "<i8").tobytes())
        for first in range(0, len(self.tokens), _CHUNK):
            state.update(np.asarray(self.tokens[first : first + _CHUNK], "<u4").tobytes())
        return state.hexdigest()


@dataclass(frozen=True, eq=False)
class Stream:
    """Pieces of a domain laid end to end and cut every `length` positions; the last sequence may be short.

    starts, sizes (P,): pieces as ranges of positions in the domain's X.
    """

    tokens: np.ndarray | TokenArray
    starts: np.ndarray
    sizes: np.ndarray
    domain: int
    length: int

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.sizes)

    @cached_property
    def _shift(self) -> np.ndarray:
        return self.starts - self._ends + self.sizes

    @property
    def positions(self) -> int:
        """Positions with a target."""
        return int(self._ends[-1])

    @property
    def sequences(self) -> int:
        return -(-self.positions // self.length)

    def read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, targets, piece number) of the positions first..last-1, int64 each."""
        where = np.arange(first, min(last, self.positions))
        piece = np.searchsorted(self._ends, where, side="right")
        index = where + self._shift[piece]
        return self.tokens[index].astype(np.int64), self.tokens[index + 1].astype(np.int64), piece

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sequence `index`: (tokens, targets, document number from 0), each at most `length` long."""
        tokens, targets, piece = self.read(index * self.length, (index + 1) * self.length)
        return tokens, targets, piece - piece[0]


class Pool:
    """Streams whose sequences are shuffled together, in an order that `key` and the epoch make."""

    def __init__(self, streams: tuple[Stream, ...], key: tuple[int, ...]) -> None:
        self.streams = streams
        self.key = key
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    @property
    def sequences(self) -> int:
        return sum(s.sequences for s in self.streams)

    @property
    def positions(self) -> int:
        return sum(s.positions for s in self.streams)

    def at(self, index: int) -> tuple[Stream, int]:
        """The index-th sequence of an endless run of epochs, each a new order: (stream, sequence in it)."""
        epoch, place = divmod(index, self.sequences)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, scrambled(self.sequences, (*self.key, epoch))
        chosen = int(self._order[place])
        for stream in self.streams:
            if chosen < stream.sequences:
                return stream, chosen
            chosen -= stream.sequences
        raise AssertionError("a pool's sequences are those of its streams")


def split(domain: Domain, fraction: float, key: tuple[int, ...]) -> tuple[Pieces, Pieces]:
    """Pieces (starts, sizes) for training and for validation.

    Documents in a scrambled order go to validation while they fit into `fraction` of the domain. Where not one
    fits (a single long file), the tail of the longest document is cut off instead.
    Raises ValueError when the domain has fewer than two positions.
    """
    starts, sizes = domain.starts[:-1], np.diff(domain.starts)
    total = int(sizes.sum())
    if total < 2:
        raise ValueError(f"data: {domain.name!r} holds no text to train and validate on; give files that are not empty")
    budget = max(1, int(fraction * total))
    held = np.zeros(len(sizes), bool)
    left = budget
    for d in scrambled(len(sizes), key):
        if sizes[d] <= left:
            held[d] = True
            left -= int(sizes[d])
    if held.any():
        return (starts[~held], sizes[~held]), (starts[held], sizes[held])
    longest = int(np.argmax(sizes))
    train = sizes.copy()
    train[longest] -= budget
    return (starts, train), (np.array([starts[longest] + train[longest]]), np.array([budget]))


def scrambled(count: int, key: tuple[int, ...]) -> np.ndarray:
    """A permutation of 0..count-1 that depends on integers alone, not on a library's generator."""
    seed = np.zeros(1, np.uint64)
    for part in key:
        seed = _mix(seed + np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return np.argsort(_mix(seed + _mix(np.arange(count, dtype=np.uint64))), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 step: neighbours in, unrelated numbers out."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
