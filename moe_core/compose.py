"""From files and `key=value` words to one Config. Later wins; an unknown key is answered with the nearest one.

A file may name others: `base` (an experiment), `model`, `cluster` and `parallel.scheme`, each a path or a
packaged name. They are read first, in this order, then the file's own keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from . import keys
from .combinations import ConfigError, check_combinations
from .config import Config, ModelConfig, MoeConfig
from .packaged import KINDS, locate
from .yaml_text import parse_file, parse_scalar

CUSTOM = "custom"
"""`parallel.scheme` of a combination that has no name."""
AUTO = "auto"
"""`parallel.scheme` that `train` replaces at the start by what `plan` would choose."""
AXES = ("planner", "placement", "transport", "residency")

Raw = dict[str, Any]

_STARTED = {"model": ModelConfig, "moe": MoeConfig}
_REFERENCES = {
    "base": ("experiments", ()),
    "model": (KINDS["model"], ("model", "moe")),
    "cluster": (KINDS["cluster"], ("cluster",)),
}
"""Key -> (folder of packaged names, sections that a reference replaces; none named: all)."""


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """One validated Config from a path, a packaged name or a mapping, then `key=value` words in order.

    Raises ConfigError with one sentence: missing file, unknown key, wrong type, refused combination.
    """
    config = compose(source, overrides)
    check_combinations(config)
    return config


def compose(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """As `load_config`, without a look at combinations."""
    merged: Raw = {}
    if isinstance(source, Mapping):
        _apply(merged, source, Path.cwd(), ())
    else:
        _apply_file(merged, str(source), "experiments", Path.cwd(), ())
    for word in overrides:
        _apply(merged, parse_override(word), Path.cwd(), ())
    return _typed(_started(merged))


def _started(merged: Raw) -> Raw:
    """Under `model.init_from`, what the file leaves open of `model` and `moe` is as the checkpoint says."""
    own: dict[str, Raw] = {name: merged.get(name) or {} for name in ("model", "moe")}
    if not all(isinstance(section, dict) for section in own.values()):
        return merged
    origin = own["model"].get("init_from")
    complete = all(own[name].keys() >= section.model_fields.keys() for name, section in _STARTED.items())
    if not isinstance(origin, str) or complete:
        return merged
    from .init_from import sections_of

    started: Raw = {key: dict(value) if isinstance(value, dict) else value for key, value in merged.items()}
    for name, section in sections_of(Path(origin)).items():
        whole = dict(section)
        _merge(whole, own[name])
        started[name] = whole
    started["model"]["init_from"] = str(Path(origin).absolute())
    return started


def parse_override(word: str) -> Raw:
    """`train.steps=20` as a nested mapping; the value is read as YAML."""
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{word!r} is not of the form key=value, for example train.steps=20")
    return _nest(key.strip(), parse_scalar(text, word))


def command_line_backend(overrides: Sequence[str]) -> str | None:
    """The backend that `backend=...` asks for, if a word does."""
    named = [parse_override(word).get("backend") for word in overrides if word.partition("=")[0].strip() == "backend"]
    return str(named[-1]) if named and named[-1] is not None else None


def validate(merged: Mapping[str, Any]) -> Config:
    """The Config of a merged mapping without references. ConfigError in one sentence."""
    config = _typed(merged)
    check_combinations(config)
    return config


def _typed(merged: Mapping[str, Any]) -> Config:
    keys.check(merged)
    try:
        config = Config.model_validate_json(json.dumps(merged, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(keys.explain(error)) from None
    return _named(config)


def dump(config: Config) -> str:
    """The whole config as YAML text that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)


def _apply_file(into: Raw, reference: str, kind: str, folder: Path, seen: tuple[Path, ...]) -> None:
    path = locate(reference, kind, folder)
    if path in seen:
        raise ConfigError(f"{path.name} names itself through {seen[-1].name}; take one of the references out")
    _apply(into, parse_file(path), path.parent, (*seen, path))


def _apply(into: Raw, layer: Mapping[str, Any], folder: Path, seen: tuple[Path, ...]) -> None:
    """Lay one mapping over another. What it refers to comes first, and replaces the sections that it describes."""
    own = dict(layer)
    for key, (kind, replaces) in _REFERENCES.items():
        reference = own.get(key)
        if isinstance(reference, str):
            del own[key]
            for section in replaces or tuple(into):
                into.pop(section, None)
            _apply_file(into, reference, kind, folder, seen)
    nested: Raw = {}
    for key, value in own.items():
        _merge(nested, _nest(str(key), value))
    parallel = nested.get("parallel")
    scheme = parallel.get("scheme") if isinstance(parallel, dict) else None
    if isinstance(scheme, str) and scheme not in (CUSTOM, AUTO) and not _is_scheme_file(seen):
        _apply_file(into, scheme, KINDS["scheme"], folder, seen)
    _merge(into, nested)


def _is_scheme_file(seen: tuple[Path, ...]) -> bool:
    """A scheme file states its own name."""
    return bool(seen) and seen[-1].parent.name == KINDS["scheme"]


def _named(config: Config) -> Config:
    """A scheme whose axes were changed afterwards loses its name."""
    if config.parallel.scheme in (CUSTOM, AUTO):
        return config
    written = parse_file(locate(config.parallel.scheme, KINDS["scheme"], Path.cwd())).get("parallel", {})
    if all(getattr(config.parallel, axis) == written.get(axis, getattr(config.parallel, axis)) for axis in AXES):
        return config
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"scheme": CUSTOM})})


def _nest(dotted: str, value: Any) -> Raw:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _merge(into: Raw, later: Mapping[str, Any]) -> None:
    for key, value in later.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, Mapping):
            into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = value
