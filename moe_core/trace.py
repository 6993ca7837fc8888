"""What routers chose, on disk: counts of every rank and expert, and whole id sets of sampled tokens. One format.

A file is a line that names the format, then frames: length, checksum, deflated bytes. Frames are only appended. The
first tells what the trace is about, the others are one layer of one micro-batch each. A frame that was cut off by
a crash is not read, and is overwritten when the file is opened to append. A job writes a file per expert group.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from .combinations import ConfigError

MAGIC = b"twinmoe trace 1\n"
SUFFIX = ".twtrace"
SAMPLED = 4096
"""Tokens of a layer whose ids are kept; all of them where there are fewer."""
_FRAME = struct.Struct("<II")
_HEAD = struct.Struct("<IHHIIIH")


@dataclass(frozen=True)
class TraceInfo:
    """What the frames are about. first_rank: token rank of the first row of counts; model: its hash, where known."""

    num_experts: int
    top_k: int
    ranks: int
    first_rank: int = 0
    source: str = ""
    model: str = ""


@dataclass(frozen=True, eq=False)
class Record:
    """One layer of one micro-batch. counts_RE: rows of each expert by token rank; ids_SK (-1: none), source_S: sampled
    tokens and their token ranks, counted from the first of the file."""

    step: int
    layer: int
    micro: int
    counts_RE: np.ndarray
    ids_SK: np.ndarray
    source_S: np.ndarray

    def pack(self) -> bytes:
        """Counts as int32, ids and ranks as int16 (int32 where they do not fit)."""
        (ranks, experts), (sampled, top_k) = self.counts_RE.shape, self.ids_SK.shape
        head = _HEAD.pack(self.step, self.layer, self.micro, ranks, experts, sampled, top_k)
        wide = _wide(ranks, experts)
        return head + b"".join(
            np.ascontiguousarray(a, t).tobytes()
            for a, t in ((self.counts_RE, "<i4"), (self.ids_SK, wide), (self.source_S, wide))
        )

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        step, layer, micro, ranks, experts, sampled, top_k = _HEAD.unpack_from(data)
        wide, at = np.dtype(_wide(ranks, experts)), _HEAD.size
        arrays = []
        for dtype, size in (("<i4", ranks * experts), (wide, sampled * top_k), (wide, sampled)):
            arrays.append(np.frombuffer(data, dtype, size, at))
            at += size * np.dtype(dtype).itemsize
        counts, ids, source = arrays
        shaped = counts.reshape(ranks, experts), ids.reshape(sampled, top_k).astype(np.int64), source.astype(np.int64)
        return cls(step, layer, micro, *shaped)


def _wide(ranks: int, experts: int) -> str:
    return "<i2" if max(ranks, experts) < 2**15 else "<i4"


# --- writing -----------------------------------------------------------------------------------
class TraceWriter:
    """Appends frames to a file; use it as a context manager. ConfigError where the file is another trace's."""

    def __init__(self, path: Path, info: TraceInfo) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        known, end = _scan(path) if path.exists() and path.stat().st_size else (None, 0)
        if known is not None and known != info:
            raise ConfigError(f"{path} holds a trace of other ranks or another model; name another file")
        self._file: IO[bytes] = path.open("r+b" if end else "wb")
        if end:
            self._file.truncate(end)
            self._file.seek(end)
        else:
            self._file.write(MAGIC)
            self._frame(json.dumps(asdict(info)).encode())
            self._file.flush()

    def write(self, records: Sequence[Record]) -> None:
        """Append and hand to the system: a process that dies afterwards loses nothing of it."""
        for record in records:
            self._frame(record.pack())
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _frame(self, data: bytes) -> None:
        small = zlib.compress(data, 1)
        self._file.write(_FRAME.pack(len(small), zlib.crc32(small)) + small)


# --- reading -----------------------------------------------------------------------------------
def read_file(path: Path) -> tuple[TraceInfo, Iterator[Record]]:
    """What one file is about, and its whole frames in order. ConfigError unless it is a trace."""
    info, _ = _scan(path)
    assert info is not None
    return info, (Record.unpack(data) for number, data in enumerate(_frames(path)) if number)


def _scan(path: Path) -> tuple[TraceInfo | None, int]:
    """(first frame, where whole frames end); a file cut off inside its first frame counts as new."""
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        if MAGIC.startswith(start):
            return None, 0
        raise ConfigError(f"{path} is not a trace of twinmoe; make one with `twinmoe trace record`, import or synth")
    info, end = None, len(MAGIC)
    for data in _frames(path):
        if info is None:
            info = TraceInfo(**json.loads(data))
    end = _end(path)
    if info is None:
        return None, 0
    return info, end


def _frames(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(len(MAGIC))
        while (found := _next(file)) is not None:
            yield zlib.decompress(found)


def _end(path: Path) -> int:
    with path.open("rb") as file:
        file.seek(len(MAGIC))
        end = file.tell()
        while _next(file) is not None:
            end = file.tell()
    return end


def _next(file: IO[bytes]) -> bytes | None:
    """The next whole frame, still deflated; None at the end, or where one is cut off or damaged."""
    head = file.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    length, checksum = _FRAME.unpack(head)
    data = file.read(length)
    return data if len(data) == length and zlib.crc32(data) == checksum else None


@dataclass(frozen=True, eq=False)
class Trace:
    """A whole trace in memory, groups put together. records: by (step, layer, micro-batch)."""

    info: TraceInfo
    records: dict[tuple[int, int, int], Record]

    @property
    def steps(self) -> list[int]:
        return sorted({key[0] for key in self.records})

    @property
    def layers(self) -> list[int]:
        return sorted({key[1] for key in self.records})

    def micros(self, step: int, layer: int) -> list[Record]:
        return [self.records[key] for key in sorted(self.records) if key[:2] == (step, layer)]


def read(path: Path) -> Trace:
    """A trace file, or a folder (a run folder too) of one file per expert group. ConfigError where there is none.

    Where a step was interrupted, only what all groups have counts.
    """
    files = _files(path)
    parts = [read_file(file) for file in files]
    infos = [info for info, _ in parts]
    if len({(i.num_experts, i.top_k) for i in infos}) > 1:
        raise ConfigError(f"{path} holds traces of different layers; read them one by one")
    order = sorted(range(len(parts)), key=lambda i: infos[i].first_rank)
    first = infos[order[0]].first_rank
    pieces = [{(r.step, r.layer, r.micro): r for r in parts[i][1]} for i in order]
    offsets = [infos[i].first_rank - first for i in order]
    common = [key for key in pieces[0] if all(key in piece for piece in pieces)]
    if not common:
        raise ConfigError(f"{path} holds no whole step; record a longer run")
    joined = {key: _join([piece[key] for piece in pieces], offsets) for key in common}
    ranks = len(next(iter(joined.values())).counts_RE)
    info = TraceInfo(infos[0].num_experts, infos[0].top_k, ranks, first, infos[0].source, infos[0].model)
    return Trace(info, joined)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for place in (path, path / "trace"):
        found = sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else []
        if found:
            return found
    raise ConfigError(f"there is no trace at {path}; make one with `twinmoe trace record`, import or synth")


def _join(parts: Sequence[Record], offsets: Sequence[int]) -> Record:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Record(
        first.step,
        first.layer,
        first.micro,
        np.concatenate([p.counts_RE for p in parts]),
        np.concatenate([p.ids_SK for p in parts]),
        np.concatenate([p.source_S + offset for p, offset in zip(parts, offsets, strict=True)]),
    )
