"""Checkpoints of Hugging Face to ours and back, one tensor at a time.

A converted folder is a checkpoint of step 0 (see checkpoint.py) whose folder `huggingface` keeps what is no tensor:
config, tokenizer, index, and the headers of the safetensors files, so that the way back gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import FORMAT, MANIFEST, SUMS, Checkpoint, Entry, logical_shapes, sha256
from .combinations import ConfigError
from .config import Config
from .hf_config import differences, from_config, to_config
from .hf_families import family_of
from .hf_files import (
    CONFIG,
    INDEX,
    make_header,
    parse_header,
    read_header,
    tensor_bytes,
    weight_files,
    write_file,
)
from .hf_names import Link, Shape, by_theirs, links, their_shape, to_theirs
from .init_from import OurSource, TheirSource, checkpoint_folder, is_theirs, read_about
from .mesh import Mesh
from .shapes import declared

KEPT = "huggingface"
HEADER = ".header"
FILE_BYTES = 4 << 30
"""A file of a converted checkpoint is closed at this size; theirs at about the same."""

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5"}


def from_hf(folder: Path, out: Path) -> dict[str, Any]:
    """Convert the Hugging Face model in `folder` into a new folder that `model.init_from` reads.

    Reads and writes one tensor at a time; stored as float32 (float64 if one is). ConfigError: the model, or the first
    tensor, that is not accounted for.
    """
    _check_new(out)
    source = TheirSource(folder)
    with _made(out) as temporary:
        (temporary / KEPT).mkdir()
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix not in _WEIGHTS:
                shutil.copyfile(path, temporary / KEPT / path.name)
        for path in source.shards.files:
            (temporary / KEPT / (path.name + HEADER)).write_bytes(read_header(path))
        _write_checkpoint(temporary, source)
    return {"folder": str(out), "model_type": source.about["model_type"], "tensors": len(source.shards.tensors)}


def to_hf(folder: Path, out: Path, dtype: str = "F32") -> dict[str, Any]:
    """Write a checkpoint of ours (converted or trained, or a run folder) as a Hugging Face model.

    Files, dtypes and config are those of the model that it came from, where that is known; else one that
    transformers has is looked for, and `dtype` (F32, BF16) is stored. ConfigError if there is none.
    """
    _check_new(out)
    source = OurSource(Checkpoint(checkpoint_folder(folder)))
    config = Config.model_validate({"name": folder.name, **_sections(source.checkpoint)})
    shapes = logical_shapes(declared(config, Mesh()))
    source.checkpoint.check_complete(shapes)
    template = _template(source.checkpoint.folder, config)
    family, about = (family_of(template.about), None) if template else from_config(config)
    found = by_theirs(list(links(family, config)))
    with _made(out) as temporary:
        if template is not None:
            headers = template.copy_into(temporary)
        else:
            (temporary / CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            headers = _new_headers(temporary, found, shapes, dtype)
        for name, header in headers.items():
            write_file(temporary / name, header, _their_values(header, found, shapes, source))
    return {"folder": str(out), "model_type": family.model_type, "tensors": len(found), "template": bool(template)}


def _check_new(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} exists; name a new folder")


@contextmanager
def _made(out: Path) -> Iterator[Path]:
    """A folder that takes its name once all is written, and is gone if it was not."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# --- into ours -----------------------------------------------------------------------------------
def _write_checkpoint(folder: Path, source: TheirSource) -> None:
    wide = "F64" if any(t.dtype == "F64" for t in source.shards.tensors.values()) else "F32"
    sums: dict[str, str] = {}
    table: list[dict[str, Any]] = []
    for number, names in enumerate(_parts({n: (wide, shape) for n, shape in source.shapes.items()})):
        file = f"rank_{number:05d}.safetensors"
        header = make_header({f"parameter/{n}": (wide, source.shapes[n]) for n in names})
        sums[file] = write_file(folder / file, header, ((source.whole(n), wide) for n in names))
        dtype = "float64" if wide == "F64" else "float32"
        table += [
            vars(Entry(file, f"parameter/{n}", n, "parameter", source.shapes[n], 0, None, None, 1, dtype))
            for n in names
        ]
    manifest = {
        "format": FORMAT,
        "step": 0,
        "updates": 0,
        "config": source.config.model_dump(mode="json"),
        "data": {},
        "converted_from": source.about["model_type"],
        "files": sums,
        "tensors": table,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    lines = {MANIFEST: sha256(folder / MANIFEST), **sums}
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in lines.items()), encoding="ascii")


def _parts(tensors: Mapping[str, tuple[str, Shape]]) -> Iterator[list[str]]:
    """Names in order, a file's worth each."""
    names: list[str] = []
    size = 0
    for name, (dtype, shape) in tensors.items():
        more = tensor_bytes(dtype, shape)
        if names and size + more > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


# --- back ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Template:
    """Files of the model that a checkpoint came from. kept: our folder of them, with headers in files of their own."""

    folder: Path
    kept: bool

    @property
    def about(self) -> dict[str, Any]:
        return read_about(self.folder)

    def copy_into(self, out: Path) -> dict[str, bytes]:
        """Copy what is no tensor; returns the headers of the files to be written."""
        headers = {} if self.kept else {path.name: read_header(path) for path in weight_files(self.folder)}
        for path in sorted(self.folder.iterdir()):
            if self.kept and path.suffix == HEADER:
                headers[path.name.removesuffix(HEADER)] = path.read_bytes()
            elif path.is_file() and path.suffix not in _WEIGHTS:
                shutil.copyfile(path, out / path.name)
        return headers


def _sections(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: checkpoint.manifest["config"][name] for name in ("model", "moe")}


def _template(folder: Path, config: Config) -> Template | None:
    """The files beside a converted checkpoint, or those of what a trained one started from, if they are there still."""
    origin = config.model.init_from
    places = [folder, *([Path(origin)] if origin else [])]
    for place in places:
        kept = (place / KEPT / CONFIG).is_file()
        if kept or is_theirs(place):
            template = Template(place / KEPT if kept else place, kept)
            unlike = differences(config, to_config(template.about))
            if unlike:
                raise ConfigError(f"{folder} differs from the model in {template.folder} in {', '.join(unlike[:3])}")
            return template
    return None


def _new_headers(
    out: Path, found: Mapping[str, list[Link]], shapes: Mapping[str, Shape], dtype: str
) -> dict[str, bytes]:
    tensors = {name: (dtype, their_shape(group, shapes)) for name, group in found.items()}
    parts = list(_parts(tensors))
    if len(parts) == 1:
        return {"model.safetensors": make_header(tensors)}
    files = {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": names for i, names in enumerate(parts)}
    index = {
        "metadata": {"total_size": sum(tensor_bytes(*t) for t in tensors.values())},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {file: make_header({name: tensors[name] for name in names}) for file, names in files.items()}


def _their_values(
    header: bytes, found: Mapping[str, Sequence[Link]], shapes: Mapping[str, Shape], source: OurSource
) -> Iterator[tuple[np.ndarray, str]]:
    """The tensors of a file in the order of their bytes, those of all experts one expert at a time."""
    for name, about in parse_header(header).items():
        for link in found[name]:
            yield to_theirs(link, source.whole(link.ours, shapes[link.ours])), about["dtype"]
