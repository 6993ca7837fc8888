"""Checkpoints by logical name: written by many ranks, readable at any number of ranks, scheme and backend.

A folder step_00000042 holds one safetensors file a rank, manifest.json (what is where, and everything that is not a
tensor) and SHA256SUMS, which `sha256sum -c` understands. This file reads them; `saving.py` writes them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open

from ..backends.protocol import Parameter, Piece
from .parameters import join_parts, take_part

FORMAT = 1
MANIFEST, SUMS, LATEST, CHECKPOINTS = "manifest.json", "SHA256SUMS", "latest", "checkpoints"
STATE = "state"
"""Kind of the arrays that are no parameters: losses so far, what planners remember."""

_STEP = re.compile(r"step_(\d{8})")
_SHARD = re.compile(r"rank_\d{5}\.safetensors")
_SUM = re.compile(r"([0-9a-f]{64})  ([\w.]+)\n")


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
    blocks: int
    dtype: str

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the array in the file."""
        if self.stop is None:
            return self.shape
        if self.axis is None:
            return (self.stop - self.start,)
        width = self.blocks * (self.stop - self.start)
        return tuple(width if i == self.axis else n for i, n in enumerate(self.shape))

    @property
    def extent(self) -> int:
        """What start..stop of all entries of the tensor must cover."""
        return prod(self.shape) if self.axis is None else self.shape[self.axis] // self.blocks


class Checkpoint:
    """A checkpoint opened for reading; checksums are verified before anything is handed out.

    share: (i, n) verifies every n-th data file from the i-th on, where n ranks divide the work. CheckpointError names
    what is damaged, missing or not a checkpoint's.
    """

    def __init__(self, folder: Path, share: tuple[int, int] = (0, 1)) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._entries: dict[tuple[str, str], list[Entry]] = {}
        with understood(folder):
            self.manifest = _verified_manifest(folder, share)
            for entry in _ENTRIES.validate_json(json.dumps(self.manifest["tensors"]), strict=True):
                self._entries.setdefault((entry.kind, entry.name), []).append(entry)
            for entries in self._entries.values():
                self._check_cover(sorted(entries, key=lambda e: e.start))
            self.step, self.updates = _whole(self.manifest["step"]), _whole(self.manifest["updates"])
            if self.updates > self.step:
                raise ValueError(f"{self.updates} updates in {self.step} steps")

    @property
    def kinds(self) -> list[str]:
        """Kinds of logical tensors, parameters first."""
        found = {kind for kind, _ in self._entries if kind != STATE}
        return sorted(found, key=lambda k: (k != "parameter", k))

    def check_complete(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes`: every logical tensor of the model, over all ranks. CheckpointError names the first that the
        checkpoint lacks, has besides, or has in another shape; each kind must hold them all."""
        for kind in self.kinds or ["parameter"]:
            stored = {name: entries[0].shape for (k, name), entries in self._entries.items() if k == kind}
            for name in sorted(shapes.keys() - stored.keys()):
                raise CheckpointError(f"{self.folder} lacks {kind} of {name}; was it saved from another model?")
            for name in sorted(stored.keys() - shapes.keys()):
                raise CheckpointError(f"{self.folder} holds {name}, which this model does not have; check the config")
            for name, shape in shapes.items():
                if stored[name] != tuple(shape):
                    raise CheckpointError(
                        f"{name} has shape {stored[name]} in {self.folder}, the model wants {tuple(shape)}"
                    )

    def values(self, specs: Mapping[str, Parameter]) -> Iterator[tuple[str, str, np.ndarray]]:
        """(parameter name, kind, local value) of everything that `specs` stores. CheckpointError names what lacks."""
        for name, spec in specs.items():
            for kind in self.kinds:
                pieces = spec.pieces or (spec.part or Piece(name, spec.shape),)
                parts = [self._read(kind, piece) for piece in pieces]
                value = np.stack(parts) if spec.pieces else parts[0]
                if value.shape != spec.shape:
                    raise CheckpointError(
                        f"{name} has shape {value.shape} in {self.folder}, the model wants {spec.shape}"
                    )
                yield name, kind, value

    def state(self) -> dict[str, np.ndarray]:
        """The arrays of kind `state` by name."""
        return {name: self._tensor(entries[0]) for (kind, name), entries in self._entries.items() if kind == STATE}

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
        parts = [self._tensor(entry) for entry in sorted(entries, key=lambda e: e.start)]
        first = entries[0]
        if first.stop is None:
            return parts[0]
        if first.axis is not None:
            return join_parts(parts, first.axis, first.blocks)
        return np.concatenate(parts)[: prod(first.shape)].reshape(first.shape)

    def _tensor(self, entry: Entry) -> np.ndarray:
        if entry.file not in self._open:
            self._open[entry.file] = safe_open(self.folder / entry.file, framework="numpy")
        try:
            value = self._open[entry.file].get_tensor(entry.key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / entry.file} lacks {entry.key} ({error})") from error
        if (value.shape, value.dtype.name) != (entry.stored_shape, entry.dtype):
            raise CheckpointError(
                f"{entry.key} in {self.folder / entry.file} is {value.dtype.name} {value.shape}, the manifest says "
                f"{entry.dtype} {entry.stored_shape}; take an older checkpoint"
            )
        return value

    def _check_cover(self, entries: list[Entry]) -> None:
        """The parts of a tensor follow one another, and together they are all of it."""
        first, reached = entries[0], 0
        for entry in entries:
            alike = (entry.shape, entry.axis, entry.blocks, entry.dtype) == (
                first.shape,
                first.axis,
                first.blocks,
                first.dtype,
            )
            if not alike or entry.start != reached or (entry.stop is None and len(entries) > 1):
                raise CheckpointError(f"{self.folder} holds parts of {first.name} that do not fit; take an older one")
            reached = entry.extent if entry.stop is None else entry.stop
        if reached < first.extent:
            raise CheckpointError(f"{self.folder} holds only a part of {first.name}; take an older checkpoint")


_ENTRIES = TypeAdapter(list[Entry])


@contextmanager
def understood(folder: Path) -> Iterator[None]:
    """Around what reads a manifest: CheckpointError for one whose values are missing or of another kind."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{folder / MANIFEST} does not say what a manifest must ({type(error).__name__}: {first}); take another "
            "checkpoint"
        ) from error


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of steps")
    return value


def _verified_manifest(folder: Path, share: tuple[int, int]) -> dict[str, Any]:
    sums = _sums(folder)
    _verify(folder, MANIFEST, sums.pop(MANIFEST, ""))
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {entry["file"] for entry in manifest["tensors"]} | set(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read ({error}); take an older checkpoint") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest.get('format')!r}, this version reads {FORMAT}")
    for name in sorted(files):
        if not _SHARD.fullmatch(name):
            raise CheckpointError(f"{folder / MANIFEST} names the file {name!r}, which no checkpoint has")
    if files != set(sums):
        raise CheckpointError(f"{folder / SUMS} and {MANIFEST} name different files; take an older checkpoint")
    for name in sorted(sums)[share[0] :: share[1]]:
        _verify(folder, name, sums[name])
    return manifest


def _sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, as SHA256SUMS says."""
    try:
        text = (folder / SUMS).read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / SUMS} cannot be read ({error}); take an older checkpoint") from error
    found = {match[2]: match[1] for match in _SUM.finditer(text)}
    if not found or text != sums_text(found):
        raise CheckpointError(f"{folder / SUMS} is damaged; take an older checkpoint")
    return found


def sums_text(digests: Mapping[str, str]) -> str:
    """SHA256SUMS from file name -> SHA-256, as `sha256sum` writes it."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def _verify(folder: Path, name: str, digest: str) -> None:
    try:
        whole = sha256(folder / name) == digest
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read ({error}); take an older checkpoint") from error
    if not whole:
        raise CheckpointError(f"{folder / name} is damaged (checksum); take an older checkpoint")


def candidates(run_dir: Path, resume: str | None) -> list[Path]:
    """Checkpoints to resume from, best first: none for None; for 'auto' that of `latest`, then the others, newest
    first; for a run folder its latest; for a checkpoint itself."""
    if resume is None:
        return []
    if resume == "auto":
        return _newest_first(run_dir)
    folder = Path(resume)
    if (folder / LATEST).exists() or (folder / CHECKPOINTS).is_dir():
        folder = next(iter(_newest_first(folder)), folder)
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{resume} holds no checkpoint (no {MANIFEST}); name a run folder or a step_* folder")
    return [folder]


def _newest_first(run_dir: Path) -> list[Path]:
    found = steps_in(run_dir / CHECKPOINTS)[::-1]
    try:
        name = (run_dir / LATEST).read_text(encoding="utf-8").strip()
    except OSError:
        return found
    except ValueError:
        name = "no text"
    latest = run_dir / CHECKPOINTS / _safe_name(name)
    return [latest, *(path for path in found if path != latest)] if latest in found else found


def steps_in(checkpoints: Path) -> list[Path]:
    """The checkpoint folders, by step."""
    if not checkpoints.is_dir():
        return []
    return sorted(p for p in checkpoints.iterdir() if _STEP.fullmatch(p.name))


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step_{step:08d}"


def _safe_name(name: str) -> str:
    if not _STEP.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is not the name of a checkpoint; `{LATEST}` must hold step_ and eight digits: name the folder "
            "to resume from with --resume"
        )
    return name


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def logical_shapes(parameters: Iterable[Parameter]) -> dict[str, tuple[int, ...]]:
    """Name and shape of the logical tensors that parameters are made of."""
    found: dict[str, tuple[int, ...]] = {}
    for parameter in parameters:
        for piece in parameter.pieces or (parameter.part or Piece(parameter.name, parameter.shape),):
            found[piece.name] = piece.shape
    return found
