"""Megatron's token files: PREFIX.bin is mapped where it lies, PREFIX.idx says where its documents are.

The index is `MMIDIDX\\0\\0`, version (uint64), a code of the tokens' type (uint8), the numbers of sequences and of
document bounds (uint64 each), then lengths (int32) and byte offsets (int64) of the sequences, and the sequence at
which each document begins (int64, the end included).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import DataConfig
from .data_packing import Domain, TokenArray
from .data_sources import Corpus, open_tokenizer

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
TRUSTED_SIZE = 1 << 28
"""Of token files above this many bytes the content hash takes index, size and samples, not every token."""

_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHUNK, _SAMPLES = 1 << 22, 256


@dataclass(frozen=True, eq=False)
class BoundedTokens:
    """Documents of a mapped file, read as if a boundary stood before each and behind the last.

    begins (D,): where documents begin in the file; starts (D + 1,): where their boundaries stand in this array.
    """

    file: np.ndarray
    begins: np.ndarray
    starts: np.ndarray
    boundary: int

    @property
    def nbytes(self) -> int:
        return len(self) * self.file.dtype.itemsize

    def __len__(self) -> int:
        return int(self.starts[-1]) + 1

    def __getitem__(self, index: Any) -> np.ndarray:
        where = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        document = np.searchsorted(self.starts, where, side="right") - 1
        inside = where - self.starts[document] - 1  # -1: the boundary
        begins = np.append(self.begins, 0)[document]
        tokens = self.file[np.where(inside < 0, 0, begins + inside)].astype(np.int64)
        return np.where(inside < 0, self.boundary, tokens)


def read_megatron(config: DataConfig) -> Corpus:
    """Map the files whose prefixes `data.paths` names, a domain each. ValueError says what does not fit.

    The boundary is the token that ends every document (`--append-eod`); without one, that of `data.tokenizer`.
    """
    indices = [_read_index(_prefix(path)) for path in config.paths]
    ends = {_common_end(*index) for index in indices}
    known = config.tokenizer != "bytes"
    tokenizer = open_tokenizer(config.tokenizer) if known else None
    boundary = ends.pop() if len(ends) == 1 else None
    stripped = boundary is not None
    if boundary is None:
        if tokenizer is None:
            raise ValueError(
                "data.paths: the documents do not all end with the same token; write them with --append-eod, or name "
                "the tokenizer.json in data.tokenizer"
            )
        boundary = tokenizer.boundary
    largest = max(_largest(file) for file, _, _ in indices) if tokenizer is None else 0
    size = max(largest, boundary) + 1 if tokenizer is None else max(tokenizer.vocab_size, boundary + 1)
    domains, digests = [], []
    for path, (file, begins, sizes) in zip(config.paths, indices, strict=True):
        domains.append(_domain(path, file, begins, sizes - stripped, boundary))
        digests.append(_digest(_prefix(path), file, domains[-1]))
    return Corpus(tuple(domains), boundary, size, tuple(digests))


def _domain(name: str, file: np.ndarray, begins: np.ndarray, sizes: np.ndarray, boundary: int) -> Domain:
    kept = sizes > 0
    starts = np.cumsum(np.append(0, sizes[kept] + 1), dtype=np.int64)
    tokens: TokenArray = BoundedTokens(file, begins[kept], starts, boundary)
    return Domain(name, tokens, starts)


def _prefix(path: str) -> Path:
    return Path(path.removesuffix(".bin").removesuffix(".idx"))


def _read_index(prefix: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mapped tokens, first token of each document, its length)."""
    index, tokens = (prefix.with_name(prefix.name + end) for end in (".idx", ".bin"))
    try:
        raw = np.memmap(index, "u1", "r")
        if bytes(raw[:9]) != MAGIC or int(raw[9:17].view("<u8")[0]) != VERSION:
            raise ValueError(f"data.paths: {index} is no index of Megatron's; name the prefix of .bin and .idx files")
        dtype = _DTYPES.get(int(raw[17]))
        if dtype is None:
            raise ValueError(f"data.paths: {index} says that tokens are of type {int(raw[17])}, which is no integer")
        sequences, bounds = (int(n) for n in raw[18:34].view("<u8"))
        body = raw[34:]
        lengths = body[: 4 * sequences].view("<i4").astype(np.int64)
        offsets = body[4 * sequences : 12 * sequences].view("<i8") // np.dtype(dtype).itemsize
        documents = body[12 * sequences : 12 * sequences + 8 * bounds].view("<i8")
        file = np.memmap(tokens, dtype, "r")
    except (OSError, IndexError) as error:
        raise ValueError(f"data.paths: {prefix}.bin and .idx can't be read ({error}); check the path") from error
    ends = offsets + lengths
    whole = len(lengths) == len(offsets) == sequences and len(documents) == bounds >= 2
    if not whole or documents[-1] != sequences or ends[-1] > len(file) or (offsets[1:] != ends[:-1]).any():
        raise ValueError(f"data.paths: {index.name} and {tokens.name} do not belong together; write them again")
    limits = np.append(offsets, ends[-1])[documents]
    return file, limits[:-1], np.diff(limits)


def _common_end(file: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> int | None:
    last = np.unique(file[(begins + sizes - 1)[sizes > 0]])
    return int(last[0]) if len(last) == 1 else None


def _largest(file: np.ndarray) -> int:
    return max(int(file[first : first + _CHUNK].max()) for first in range(0, len(file), _CHUNK))


def _digest(prefix: Path, file: np.ndarray, domain: Domain) -> str:
    if file.nbytes <= TRUSTED_SIZE:
        return domain.digest()
    state = hashlib.sha256(prefix.with_name(prefix.name + ".idx").read_bytes() + str(file.nbytes).encode())
    for first in np.linspace(0, len(file) - _SAMPLES, _SAMPLES).astype(np.int64):
        state.update(np.ascontiguousarray(file[first : first + _SAMPLES]).tobytes())
    return state.hexdigest()
