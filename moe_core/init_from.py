"""A model that starts from a checkpoint: `model.init_from` names a converted or trained checkpoint of ours, or the
folder of a Hugging Face model. Each rank reads what it stores, whatever the scheme."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..backends.protocol import Component, Parameter, Piece
from .checkpoint import MANIFEST, Checkpoint, CheckpointError, candidates, logical_shapes
from .combinations import ConfigError
from .config import Config
from .hf_config import differences, to_config, to_sections
from .hf_families import family_of
from .hf_files import CONFIG, Shards
from .hf_names import Shape, by_ours, by_theirs, links, their_shape, to_ours
from .mesh import Mesh
from .parameters import take_part
from .shapes import declared

SECTIONS = ("model", "moe")


class Source(Protocol):
    """Parameters by logical name."""

    def local(self, parameter: Parameter) -> np.ndarray:
        """What this rank stores of a parameter."""
        ...


class OurSource:
    """A checkpoint of ours, of any layout."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def local(self, parameter: Parameter) -> np.ndarray:
        for _, kind, value in self.checkpoint.values({parameter.name: parameter}):
            if kind == "parameter":
                return value
        raise CheckpointError(f"{self.checkpoint.folder} lacks {parameter.name}; was it saved from another model?")

    def whole(self, name: str, shape: Shape) -> np.ndarray:
        """One logical tensor."""
        return self.local(Parameter(name, shape, np.zeros(0).copy))


class TheirSource:
    """A folder with config.json and safetensors files. ConfigError unless every tensor is accounted for."""

    def __init__(self, folder: Path) -> None:
        self.about = read_about(folder)
        self.config = to_config(self.about)
        self.shards = Shards(folder)
        self.shapes = logical_shapes(declared(self.config, Mesh()))
        found = list(links(family_of(self.about), self.config))
        self.links, self.theirs = by_ours(found), by_theirs(found)
        check_accounted(folder, self.shards, {n: their_shape(group, self.shapes) for n, group in self.theirs.items()})

    def whole(self, name: str) -> np.ndarray:
        """One of our logical tensors."""
        parts = [(link, self.shards.tensors[link.theirs].read(link.row)) for link in self.links[name]]
        return to_ours(parts, self.shapes[name])

    def local(self, parameter: Parameter) -> np.ndarray:
        pieces = parameter.pieces or (parameter.part or Piece(parameter.name, parameter.shape),)
        parts = [cut(self.whole(piece.name), piece) for piece in pieces]
        return np.stack(parts) if parameter.pieces else parts[0]


def cut(whole: np.ndarray, piece: Piece) -> np.ndarray:
    """What a piece holds of a logical tensor; flat pieces are padded with zeros at the end."""
    if piece.stop is None:
        return whole
    if piece.axis is not None:
        return take_part(whole, piece)
    part = np.zeros(piece.stop - piece.start, whole.dtype)
    got = whole.reshape(-1)[piece.start : piece.stop]
    part[: len(got)] = got
    return part


def check_accounted(folder: Path, shards: Shards, wanted: Mapping[str, Shape]) -> None:
    """ConfigError names the first tensor that is missing, that nobody asked for, or that has another shape."""
    for name, shape in wanted.items():
        stored = shards.tensors.get(name)
        if stored is None:
            raise ConfigError(f"{folder} lacks {name}, which its {CONFIG} calls for; fetch all of its files")
        if stored.shape != shape:
            turned = "is transposed" if stored.shape == shape[::-1] else "has another shape"
            raise ConfigError(
                f"{name} in {stored.file.name} {turned}: {list(stored.shape)}, {CONFIG} calls for {list(shape)}; take "
                "files that belong together"
            )
    for name in shards.tensors:
        if name not in wanted:
            raise ConfigError(f"{folder} holds {name}, which the model that its {CONFIG} describes does not have")


def read_about(folder: Path) -> dict[str, Any]:
    """config.json. ConfigError where it can't be read."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / CONFIG} can't be read ({error}); name the folder of a model") from None


def is_theirs(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def checkpoint_folder(folder: Path) -> Path:
    """Of a run folder the newest checkpoint; of a checkpoint itself. ConfigError if it is neither."""
    try:
        return candidates(folder, str(folder))[0]
    except (CheckpointError, OSError) as error:
        raise ConfigError(f"model.init_from={folder}: {error}") from None


def sections_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of `model` and `moe`."""
    if is_theirs(folder):
        return to_sections(read_about(folder))
    path = checkpoint_folder(folder) / MANIFEST
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        return {name: dict(config[name]) for name in SECTIONS}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} can't be read ({error!r}); name another checkpoint") from None


def open_source(folder: Path, config: Config, share: tuple[int, int] = (0, 1)) -> Source:
    """The checkpoint that a model of `config` starts from. ConfigError or CheckpointError name what does not fit.

    share: (i, n) verifies every n-th file's checksum, from the i-th on.
    """
    if is_theirs(folder):
        source = TheirSource(folder)
        _check_same(folder, config, source.config)
        return source
    checkpoint = Checkpoint(checkpoint_folder(folder), share)
    parameters = {n: p for n, p in logical_shapes(declared(config, Mesh())).items()}
    _check_same(folder, config, Config.model_validate({n: checkpoint.manifest["config"][n] for n in SECTIONS}))
    checkpoint.check_complete(parameters)
    return OurSource(checkpoint)


def _check_same(folder: Path, config: Config, theirs: Config) -> None:
    unlike = differences(config, theirs)
    if unlike:
        raise ConfigError(
            f"{', '.join(unlike[:3])} of this config are not those of model.init_from={folder}; leave out `model` and "
            "`moe` settings that decide what the model computes"
        )


def started_from(components: tuple[Component, ...], source: Source) -> tuple[Component, ...]:
    """The components, whose parameters have the source's values as their first ones."""

    def started(parameter: Parameter) -> Parameter:
        if 0 in parameter.shape:  # a rank without experts
            return parameter
        return replace(parameter, initial=lambda: source.local(parameter))

    return tuple(replace(c, parameters=tuple(map(started, c.parameters))) for c in components)
