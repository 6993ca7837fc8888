"""Safetensors as Hugging Face writes them, tensor by tensor: read through maps, written as a stream.

NumPy has no bfloat16, so values of 16 bits pass as what they are and are widened to float32 here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .combinations import ConfigError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_STORED: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LONGEST_HEADER = 1 << 28


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: where its bytes are."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self, row: int | None = None) -> np.ndarray:
        """The values, float16 and bfloat16 widened to float32; row: only that entry of the first axis."""
        raw = np.memmap(self.file, _STORED[self.dtype], "r", self.start, self.shape)
        return widened(np.asarray(raw if row is None else raw[row]), self.dtype)


class Shards:
    """The safetensors files of a folder by tensor. ConfigError: none there, a file is cut short, unknown dtypes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self.files = weight_files(folder)
        for file in self.files:
            self._add(file)

    def _add(self, file: Path) -> None:
        header = read_header(file)
        start = 8 + len(header)
        size = file.stat().st_size
        for name, about in parse_header(header).items():
            tensor = Stored(file, name, about["dtype"], tuple(about["shape"]), start + about["data_offsets"][0])
            if tensor.dtype not in _STORED:
                raise ConfigError(
                    f"{name} in {file.name} is {tensor.dtype}, which is not trained with; save the model in bfloat16 "
                    "or float32"
                )
            end = start + about["data_offsets"][1]
            if end > size or end - tensor.start != prod(tensor.shape) * np.dtype(_STORED[tensor.dtype]).itemsize:
                raise ConfigError(f"{file} is cut short or damaged at {name}; fetch it again")
            if name in self.tensors:
                raise ConfigError(f"{name} is in {self.tensors[name].file.name} and in {file.name}; remove one")
            self.tensors[name] = tensor


def weight_files(folder: Path) -> list[Path]:
    """Those that the index names; without one, all safetensors files."""
    index = folder / INDEX
    if index.is_file():
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in named if Path(name).name == name]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {missing[0]}, which {INDEX} names; fetch it")
    if not files:
        raise ConfigError(
            f"{folder} holds no safetensors file; save the model with save_pretrained(..., safe_serialization=True)"
        )
    return files


def read_header(file: Path) -> bytes:
    """The header's text as it is, padding included."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length) if length < _LONGEST_HEADER else b""
    if len(header) != length or not header.startswith(b"{"):
        raise ConfigError(f"{file} is not a safetensors file; fetch it again")
    return header


def parse_header(header: bytes) -> dict[str, dict[str, Any]]:
    """Tensors of a header in the order of their bytes."""
    found = {name: about for name, about in json.loads(header).items() if name != "__metadata__"}
    return dict(sorted(found.items(), key=lambda item: item[1]["data_offsets"]))


def make_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A header for tensors, name -> (dtype, shape), that follow one another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + prod(shape) * np.dtype(_STORED[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * np.dtype(_STORED[dtype]).itemsize


def write_file(path: Path, header: bytes, values: Iterable[tuple[np.ndarray, str]]) -> str:
    """Write a header and then (values, dtype) one after the other; returns the SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(header).to_bytes(8, "little"), header):
            digest.update(part)
            file.write(part)
        for value, dtype in values:
            data = narrowed(value, dtype)
            digest.update(data.data)
            data.tofile(file)
    return digest.hexdigest()


def widened(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values as float32 (F64: float64), exactly."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64 if dtype == "F64" else np.float32)


def narrowed(value: np.ndarray, dtype: str) -> np.ndarray:
    """Values in a stored dtype, contiguous; rounded to nearest, ties to even, where they do not fit."""
    if dtype != "BF16":
        return np.ascontiguousarray(value, _STORED[dtype])
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    cut_nan = ((bits & 0x7FFFFFFF) > 0x7F800000) & ((bits & 0xFFFF) != 0)  # rounding could make it infinite
    return np.where(cut_nan, (bits >> 16) | 0x40, rounded).astype("<u2")
