"""Unknown keys and wrong values, told in one sentence with the nearest key that exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from .combinations import ConfigError
from .config import Config
from .words import NOT_OFFERED, alias_table


def valid_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a config may set."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from valid_keys(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def sections() -> list[str]:
    return sorted({key.split(".", 1)[0] for key in valid_keys() if "." in key})


def check(merged: Mapping[str, Any]) -> None:
    """ConfigError for the first key that does not exist, or a section that is not one."""
    known = set(valid_keys())
    for key, value in _flat(merged):
        if key in known:
            continue
        if key in sections():
            raise ConfigError(f"{key} must hold keys and values, not {value!r}; for example {_example(key)}")
        raise ConfigError(unknown(key))


def unknown(key: str) -> str:
    """The sentence for a key that does not exist."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf in NOT_OFFERED:
        return f"unknown key {key}: {NOT_OFFERED[leaf]} is not part of twinmoe; take it out"
    ours = alias_table().get(leaf)
    if ours is not None:
        return f"unknown key {key}; here it is called {ours}"
    near = nearest(key)
    return (
        f"unknown key {key}; did you mean {near}?"
        if near
        else f"unknown key {key}; sections are {', '.join(sections())}"
    )


def nearest(key: str) -> str | None:
    """The valid key closest to this one: same last word elsewhere, else closest spelling."""
    known = list(valid_keys())
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return same_leaf[0]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if close:
        return close[0]
    leaves = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    close = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.6)
    return leaves[close[0]] if close else None


def explain(error: ValidationError) -> str:
    """The first fault that pydantic found, as one sentence."""
    faults = error.errors(include_url=False)
    first = faults[0]
    if first["type"] == "value_error":
        sentence = first["msg"].removeprefix("Value error, ")
        section = _place(first["loc"])
        return sentence if section in sentence or not section else f"{section}: {sentence}"
    place = _place(first["loc"])
    extra = next((f for f in faults if f["type"] == "extra_forbidden"), None)
    if extra is not None:  # inside a list, where `check` does not look
        return f"unknown key {'.'.join(map(str, extra['loc']))}; take it out"
    if first["type"] == "missing":
        return f"{place} is missing; give it a value"
    same = [f for f in faults if _place(f["loc"]) == place]
    wanted = " or ".join(dict.fromkeys(f["msg"].removeprefix("Input should be ") for f in same))
    return f"{place}={first['input']!r} is not accepted: it should be {wanted}"


def _place(location: tuple[int | str, ...]) -> str:
    """The dotted key; pydantic appends the tried type of a union, which is no part of it."""
    known = set(valid_keys())
    parts: list[str] = []
    for part in location:
        if ".".join(parts) in known and not isinstance(part, int):
            break
        parts.append(str(part))
    return ".".join(parts)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    known = set(valid_keys())
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in known:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _example(section: str) -> str:
    return next(key for key in valid_keys() if key.startswith(f"{section}."))
