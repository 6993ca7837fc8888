"""YAML in: the safe loader, with 1e-3 as a number and a key given twice refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .combinations import ConfigError

_MOST = 100_000


class _Loader(yaml.SafeLoader):
    """SafeLoader of YAML 1.1 would take 1e-3 for text and keep the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            problem = None
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be a word"
            elif key_node.value in seen:
                problem = f"the key {key_node.value!r} is given twice"
            if problem is not None:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _load(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("brackets or lists lie in one another too deeply") from None


def parse_file(path: Path) -> dict[str, Any]:
    """The mapping that a file holds (empty file: empty mapping). ConfigError in one sentence."""
    try:
        value = _load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} can't be read as text: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not valid YAML: {_place(error)}") from None
    if value is None:
        return {}
    _check_size(value, path.name)
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} must hold keys and values, not a {type(value).__name__}")
    return value


def parse_scalar(text: str, word: str) -> Any:
    """The YAML value of the right side of `key=value`."""
    try:
        value = _load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {word!r} is not valid YAML: {_place(error)}") from None
    _check_size(value, repr(word))
    return value


def _check_size(value: Any, where: str) -> None:
    """Aliases are written once and count each time: a few lines can stand for a value without end."""
    left, seen = [value], 0
    while left:
        item, seen = left.pop(), seen + 1
        if seen > _MOST:
            raise ConfigError(f"{where} stands for more than {_MOST} values; take out aliases that repeat one another")
        if isinstance(item, dict):
            left += item.values()
        elif isinstance(item, (list, tuple, set)):
            left += item


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).split("\n", 1)[0]
    return f"{what} (line {mark.line + 1}, column {mark.column + 1})" if mark else what
