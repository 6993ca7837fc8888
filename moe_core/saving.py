"""Writing checkpoints: under a temporary name, flushed to disk, renamed; `latest` moves last.

A save that a full disk stops is given up on all ranks alike: what was there before stays, and training goes on.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..backends.protocol import Communicator, Group, Parameter, Piece
from .checkpoint import (
    FORMAT,
    LATEST,
    MANIFEST,
    STATE,
    SUMS,
    CheckpointError,
    Entry,
    sha256,
    step_name,
    steps_in,
    sums_text,
)

STORAGE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EFBIG})
"""What a full or failing disk says: worth going on without this checkpoint."""

Tensors = Iterable[tuple[str, str, np.ndarray]]


def write_shard(
    folder: Path,
    rank: int,
    specs: Mapping[str, Parameter],
    groups: Mapping[str, Group],
    tensors: Tensors,
    state: Mapping[str, np.ndarray] | None = None,
) -> None:
    """This rank's file and its table; `state`: arrays of this rank that are no parameters. OSError, disk full too."""
    _write(folder, rank, *shard_of(rank, specs, groups, tensors, state or {}))


def shard_of(
    rank: int,
    specs: Mapping[str, Parameter],
    groups: Mapping[str, Group],
    tensors: Tensors,
    state: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], list[Entry]]:
    """(arrays by key, table) that this rank writes: what it alone has, and its share of what a group has alike."""
    arrays: dict[str, np.ndarray] = {}
    table: list[Entry] = []
    file = f"rank_{rank:05d}.safetensors"
    for name, kind, value in tensors:
        spec = specs[name]
        group = groups[spec.reduce_over]
        if group.index != zlib.crc32(f"{kind}/{name}".encode()) % group.size:
            continue
        for piece, part in _parts(spec, value):
            key = f"{kind}/{piece.name}" + ("" if piece.stop is None else f"/{piece.start}")
            arrays[key] = np.asarray(part, order="C")
            place = (piece.start, piece.stop, piece.axis, piece.blocks)
            table.append(Entry(file, key, piece.name, kind, piece.shape, *place, part.dtype.name))
    for name, value in state.items():
        arrays[f"{STATE}/{name}"] = np.asarray(value, order="C")
        whole = (0, None, None, 1, value.dtype.name)
        table.append(Entry(file, f"{STATE}/{name}", name, STATE, value.shape, *whole))
    return arrays, table


def _parts(spec: Parameter, value: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
    if not spec.pieces:
        yield spec.part or Piece(spec.name, spec.shape), value
        return
    for row, piece in enumerate(spec.pieces):
        yield piece, value[row]


def _write(folder: Path, rank: int, arrays: dict[str, np.ndarray], table: list[Entry]) -> None:
    path = folder / f"rank_{rank:05d}.safetensors"
    try:
        save_file(arrays, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    _flush(path)
    record = {"file": path.name, "sha256": sha256(path), "entries": [vars(entry) for entry in table]}
    _write_text(_table_path(folder, rank), json.dumps(record))


def _table_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def publish(temporary: Path, final: Path, ranks: int, manifest: Mapping[str, Any]) -> None:
    """Rank 0, once all ranks have written: merge the tables, flush, rename, move `latest`."""
    tables = []
    for rank in range(ranks):
        part = _table_path(temporary, rank)
        if not part.exists():
            raise CheckpointError(
                f"{part.name} did not arrive in {temporary}; checkpoints need a folder that all ranks share"
            )
        tables.append(json.loads(part.read_text(encoding="utf-8")))
    whole = {"format": FORMAT, **manifest, "files": {t["file"]: t["sha256"] for t in tables}}
    whole["tensors"] = [entry for t in tables for entry in t["entries"]]
    _write_text(temporary / MANIFEST, json.dumps(whole))
    sums = {MANIFEST: sha256(temporary / MANIFEST), **whole["files"]}
    _write_text(temporary / SUMS, sums_text(sums))
    for rank in range(ranks):
        _table_path(temporary, rank).unlink()
    _flush(temporary)
    pointer = final.parent.parent / LATEST
    _write_text(pointer.with_suffix(".new"), final.name + "\n")  # a disk that is full for this is found out in time
    _take_place(temporary, final)
    pointer.with_suffix(".new").replace(pointer)
    _flush(pointer.parent)


def _take_place(temporary: Path, final: Path) -> None:
    """Rename; a checkpoint of the same step steps aside first, so that at no moment neither is there."""
    aside = final.with_name(final.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    _flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def prune(checkpoints: Path, keep_last: int, step: int) -> None:
    """Keep the newest `keep_last` up to `step`, the one just written. Steps beyond it belong to a run that was taken
    back, and leftovers to saves that were interrupted: both go."""
    for left in (*checkpoints.glob("*.tmp"), *checkpoints.glob("*.old")):
        shutil.rmtree(left, ignore_errors=True)
    done = [path for path in steps_in(checkpoints) if path.name <= step_name(step)]
    for path in {*steps_in(checkpoints)} - {*done[-keep_last:]}:
        shutil.rmtree(path, ignore_errors=True)


@dataclass
class Pending:
    """A save under way: `failed` is the code of the error that stopped this rank's part."""

    step: int
    manifest: dict[str, Any]
    temporary: Path
    thread: threading.Thread | None = None
    failed: int = 0
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.thread is None or not self.thread.is_alive()


@dataclass
class Saver:
    """The checkpoints of a run, seen from one rank. Every method is called by all ranks alike.

    written: the step of the last checkpoint that this run published.
    background: files are written by a thread while training goes on; the checkpoint is published once all ranks'
    threads have finished, which `status` and `settle` find out in the step's own gather.
    """

    checkpoints: Path
    comm: Communicator
    world: Group
    keep_last: int
    background: bool = False
    warnings: list[str] = field(default_factory=list)
    pending: Pending | None = None
    written: int | None = None

    def save(
        self,
        step: int,
        manifest: dict[str, Any],
        specs: Mapping[str, Parameter],
        groups: Mapping[str, Group],
        contents: tuple[Tensors, Mapping[str, np.ndarray]],
    ) -> Path | None:
        """Write a checkpoint; contents: tensors and state. None where it could not be written (or not yet).

        Raises what is not a full or failing disk.
        """
        self.finish()
        pending = Pending(step, manifest, self.checkpoints / f"{step_name(step)}.tmp")
        pending.failed = self._storage(self._prepare, pending.temporary)
        if self._gave_up(pending):
            return None
        arrays, table = shard_of(self.comm.rank, specs, groups, *contents)
        self.pending = pending
        if self.background:
            pending.thread = threading.Thread(target=self._write_quietly, args=(pending, arrays, table), daemon=True)
            pending.thread.start()
            return None
        pending.failed = self._storage(_write, pending.temporary, self.comm.rank, arrays, table)
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for the save under way, if any, and publish it."""
        if self.pending is None:
            return None
        if self.pending.thread is not None:
            self.pending.thread.join()
        return self._end(self.pending)

    def status(self) -> dict[str, float]:
        """This rank's part of the step's sums: whether its files are written."""
        return {} if self.pending is None else {SAVED: float(self.pending.done)}

    def settle(self, sums: Mapping[str, float]) -> None:
        """Publish a save in the background if all ranks have written; sums: of `status` over ranks."""
        if self.pending is not None and sums.get(SAVED, 0.0) >= self.world.size:
            self._end(self.pending)

    def _prepare(self, temporary: Path) -> None:
        if self.comm.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def _end(self, pending: Pending) -> Path | None:
        self.pending = None
        if pending.error is not None:
            raise pending.error
        if self._gave_up(pending):
            return None
        final = self.checkpoints / step_name(pending.step)
        if self.comm.rank == 0:
            pending.failed = self._storage(publish, pending.temporary, final, self.comm.size, pending.manifest)
        if self._gave_up(pending):
            return None
        if self.comm.rank == 0:
            prune(self.checkpoints, self.keep_last, pending.step)
        self.written = pending.step
        return final

    def _gave_up(self, pending: Pending) -> bool:
        """Whether some rank's disk failed: the same answer on all ranks. Then the temporary folder goes."""
        codes = self.comm.gather_to_host(np.array([pending.failed]), self.world).reshape(-1)
        bad = np.flatnonzero(codes)
        if not len(bad):
            return False
        if self.comm.rank == 0:
            shutil.rmtree(pending.temporary, ignore_errors=True)
        kept = [path.name for path in steps_in(self.checkpoints)]
        last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        self.warnings.append(
            f"the checkpoint of step {pending.step} was NOT written: {os.strerror(int(codes[bad[0]]))} on rank "
            f"{', '.join(map(str, bad))}; training goes on, {last}; free space in {self.checkpoints}"
        )
        return True

    @staticmethod
    def _storage(call: Any, *arguments: Any) -> int:
        """0, or the code of the error by which a full or failing disk stopped the call."""
        try:
            call(*arguments)
        except OSError as error:
            if error.errno not in STORAGE_ERRORS:
                raise
            return error.errno
        return 0

    def _write_quietly(self, pending: Pending, arrays: dict[str, np.ndarray], table: list[Entry]) -> None:
        try:
            pending.failed = self._storage(_write, pending.temporary, self.comm.rank, arrays, table)
        except BaseException as error:
            pending.error = error


SAVED = "save/written"
"""Name of `Saver.status` among a step's scalars."""


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
