"""The configs that come with the package, and how a name or a path becomes a file."""

from __future__ import annotations

from pathlib import Path

from .combinations import ConfigError

KINDS = {"experiment": "experiments", "model": "models", "scheme": "schemes", "cluster": "clusters"}
"""What a user calls it -> its folder under configs/."""


def folder() -> Path:
    return Path(__file__).resolve().parent.parent / "configs"


def names(kind: str) -> list[str]:
    """Packaged names of one folder, sorted."""
    return sorted(path.stem for path in (folder() / kind).glob("*.yaml"))


def find(name: str) -> Path:
    """The packaged file of that name, of whatever kind; `models/NAME` picks a kind. ConfigError if there is none."""
    place, _, stem = name.rpartition("/")
    for kind in KINDS.values():
        if stem in names(kind) and place in ("", kind):
            return folder() / kind / f"{stem}.yaml"
    raise ConfigError(f"there is no packaged config {name!r}; `twinmoe configs list` names them")


def kind_of(path: Path) -> str:
    """What a user calls the kind of a packaged file."""
    return next(kind for kind, place in KINDS.items() if place == path.parent.name)


def locate(reference: str, kind: str, beside: Path) -> Path:
    """The file of a packaged name, or of a path (relative to `beside`). ConfigError if there is none.

    Where an experiment is asked for, the name of a model shape will do too.
    """
    for place in (kind, "models") if kind == "experiments" else (kind,):
        packaged = folder() / place / f"{reference}.yaml"
        if Path(reference).name == reference and packaged.is_file():
            return packaged
    path = (beside / Path(reference).expanduser()).resolve()
    if path.is_file():
        return path
    looks_like_path = "/" in reference or Path(reference).suffix in (".yaml", ".yml")
    if looks_like_path:
        raise ConfigError(f"there is no file {reference!r}; give an existing path or a packaged name")
    raise ConfigError(f"there is no packaged name {reference!r} in {kind}; choose {_listed(kind)}, or give a path")


def _listed(kind: str) -> str:
    return ", ".join(names(kind)) or "a file of your own"
