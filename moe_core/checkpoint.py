"""Checkpoints by logical name: written by many ranks, readable at any number of ranks, scheme and backend.

A folder step_00000042 holds one safetensors file a rank and manifest.json (what is where, checksums, everything
that is not a tensor). It is written under a temporary name, flushed to disk and renamed; `latest` moves last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ..backends.protocol import Group, Parameter, Piece
from .parameters import join_parts, take_part

FORMAT = 1
_STEP = re.compile(r"step_(\d{8})")


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""


@dataclass(frozen=True)
class Entry:
    """One stored tensor: elements start..stop of a logical tensor (axis None: flattened; whole if stop is None)."""

    file: str
    key: str
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int | None
    axis: int | None
    blocks: int = 1


def write_shard(
    folder: Path,
    rank: int,
    specs: Mapping[str, Parameter],
    groups: Mapping[str, Group],
    tensors: Iterable[tuple[str, str, np.ndarray]],
) -> None:
    """This rank's file and its table. Each logical element is written by the first rank that holds it."""
    arrays: dict[str, np.ndarray] = {}
    table: list[dict[str, Any]] = []
    file = f"rank_{rank:05d}.safetensors"
    for name, kind, value in tensors:
        spec = specs[name]
        if groups[spec.reduce_over].index != 0:
            continue
        for piece, part in _parts(spec, value):
            key = f"{kind}/{piece.name}" + ("" if piece.stop is None else f"/{piece.start}")
            arrays[key] = np.ascontiguousarray(part)
            place = (piece.start, piece.stop, piece.axis, piece.blocks)
            table.append(vars(Entry(file, key, piece.name, kind, piece.shape, *place)))
    save_file(arrays, folder / file)
    _flush(folder / file)
    record = {"file": file, "sha256": _sha256(folder / file), "entries": table}
    (folder / f"rank_{rank:05d}.json").write_text(json.dumps(record))


def _parts(spec: Parameter, value: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
    if not spec.pieces:
        yield spec.part or Piece(spec.name, spec.shape), value
        return
    for row, piece in enumerate(spec.pieces):
        yield piece, value[row]


def publish(temporary: Path, final: Path, ranks: int, manifest: Mapping[str, Any]) -> None:
    """Rank 0, once all ranks have written: merge the tables, flush, rename, move `latest`."""
    tables = []
    for rank in range(ranks):
        part = temporary / f"rank_{rank:05d}.json"
        if not part.exists():
            raise CheckpointError(
                f"{part.name} did not arrive in {temporary}; checkpoints need a folder that all ranks share"
            )
        tables.append(json.loads(part.read_text()))
        part.unlink()
    whole = {"format": FORMAT, **manifest, "files": {t["file"]: t["sha256"] for t in tables}}
    whole["tensors"] = [entry for t in tables for entry in t["entries"]]
    (temporary / "manifest.json").write_text(json.dumps(whole))
    _flush(temporary / "manifest.json")
    _flush(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _flush(final.parent)
    pointer = final.parent.parent / "latest"
    pointer.with_suffix(".new").write_text(final.name + "\n")
    _flush(pointer.with_suffix(".new"))
    pointer.with_suffix(".new").replace(pointer)


def prune(checkpoints: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and what an interrupted save left behind."""
    for left in checkpoints.glob("*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    found = sorted(p for p in checkpoints.iterdir() if _STEP.fullmatch(p.name))
    for old in found[:-keep_last]:
        shutil.rmtree(old)


def find(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from: None, 'auto' (the newest whole one, if any) or a folder."""
    if resume is None:
        return None
    if resume != "auto":
        folder = Path(resume)
        if (folder / "latest").exists():
            folder = folder / "checkpoints" / _safe_name((folder / "latest").read_text().strip())
        if not (folder / "manifest.json").exists():
            raise CheckpointError(
                f"{resume} holds no checkpoint (no manifest.json); name a run folder or a step_* folder"
            )
        return folder
    pointer = run_dir / "latest"
    return run_dir / "checkpoints" / _safe_name(pointer.read_text().strip()) if pointer.exists() else None


def _safe_name(name: str) -> str:
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{name!r} is not the name of a checkpoint; `latest` must hold step_ and eight digits")
    return name


class Checkpoint:
    """A checkpoint opened for reading: checksums are verified before anything is handed out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text())
            files, tensors = self.manifest["files"], self.manifest["tensors"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / 'manifest.json'} cannot be read ({error}); take an older checkpoint"
            ) from error
        if self.manifest.get("format") != FORMAT:
            raise CheckpointError(f"{folder} has format {self.manifest.get('format')!r}, this version reads {FORMAT}")
        for name, digest in files.items():
            if not re.fullmatch(r"rank_\d{5}\.safetensors", name):
                raise CheckpointError(f"{folder / 'manifest.json'} names the file {name!r}, which no checkpoint has")
            if not (folder / name).exists() or _sha256(folder / name) != digest:
                raise CheckpointError(f"{folder / name} is damaged (checksum); take an older checkpoint")
        self._entries: dict[tuple[str, str], list[Entry]] = {}
        for row in tensors:
            entry = Entry(**{**row, "shape": tuple(row["shape"])})
            if entry.file not in files:
                raise CheckpointError(f"{folder / 'manifest.json'} places {entry.name} in an unknown file")
            self._entries.setdefault((entry.kind, entry.name), []).append(entry)
        self._used: set[tuple[str, str]] = set()

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def values(self, specs: Mapping[str, Parameter]) -> Iterator[tuple[str, str, np.ndarray]]:
        """(parameter name, kind, local value) of everything that `specs` stores. CheckpointError names what lacks."""
        kinds = sorted({kind for kind, _ in self._entries}, key=lambda k: (k != "parameter", k))
        for name, spec in specs.items():
            for kind in kinds:
                pieces = spec.pieces or (spec.part or Piece(name, spec.shape),)
                parts = [self._read(kind, piece) for piece in pieces]
                value = np.stack(parts) if spec.pieces else parts[0]
                if value.shape != spec.shape:
                    raise CheckpointError(
                        f"{name} has shape {value.shape} in {self.folder}, the model wants {spec.shape}"
                    )
                yield name, kind, value

    def check_complete(self, names: Iterable[str]) -> None:
        """CheckpointError naming a stored tensor that the model (all ranks' logical names) does not have."""
        extra = sorted({name for _, name in self._entries} - set(names))
        if extra:
            raise CheckpointError(f"{self.folder} holds {extra[0]}, which this model does not have; check the config")

    def _read(self, kind: str, piece: Piece) -> np.ndarray:
        entries = self._entries.get((kind, piece.name))
        if not entries:
            raise CheckpointError(f"{self.folder} lacks {kind} of {piece.name}; was it saved from another model?")
        if entries[0].shape != piece.shape:
            raise CheckpointError(
                f"{piece.name} has shape {entries[0].shape} in {self.folder}, the model wants {piece.shape}"
            )
        whole = self._assemble(entries)
        if piece.stop is None:
            return whole
        if piece.axis is not None:
            return take_part(whole, piece)
        flat = whole.reshape(-1)
        padded = np.zeros(piece.stop - piece.start, flat.dtype)
        got = flat[piece.start : piece.stop]
        padded[: len(got)] = got
        return padded

    def _assemble(self, entries: list[Entry]) -> np.ndarray:
        parts = []
        for entry in sorted(entries, key=lambda e: e.start):
            with safe_open(self.folder / entry.file, framework="numpy") as file:
                parts.append(file.get_tensor(entry.key))
        first = entries[0]
        if first.stop is None:
            return parts[0]
        if first.axis is not None:
            return join_parts(parts, first.axis, first.blocks)
        return np.concatenate(parts)[: int(np.prod(first.shape))].reshape(first.shape)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
