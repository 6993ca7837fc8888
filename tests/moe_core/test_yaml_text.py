"""YAML from strangers: no code runs, nothing grows without end, and every refusal is a ConfigError."""

from __future__ import annotations

from pathlib import Path

import pytest
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.yaml_text import parse_file, parse_scalar

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join(['*a' + str(n - 1)] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('x: !!python/object/apply:os.system ["false"]', "could not determine a constructor"),
        ("!!python/name:os.system", "could not determine a constructor"),
        (ALIASES, "stands for more than 100000 values"),
        ("a: &a [*a]", "stands for more than 100000 values"),
        ("[1]: 2", "a key must be a word"),
        ("a: 1\na: 2", "the key 'a' is given twice"),
        ("- a", "must hold keys and values, not a list"),
    ],
)
def test_what_is_no_plain_mapping_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told) as error:
        parse_file(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("piece", ["[", "{a: ", "- ", "? "])
def test_what_is_nested_without_end_is_refused(tmp_path: Path, piece: str) -> None:
    (tmp_path / "x.yaml").write_text(piece * 20_000)
    for read in (lambda: parse_file(tmp_path / "x.yaml"), lambda: parse_scalar(piece * 20_000, "x=...")):
        with pytest.raises(ConfigError, match="lie in one another too deeply") as error:
            read()
        assert "\n" not in str(error.value)


def test_a_word_is_read_as_carefully_as_a_file() -> None:
    for text in ("!!python/name:os.system", "&a [*a]", "{[1]: 2}"):
        with pytest.raises(ConfigError):
            parse_scalar(text, f"x={text}")


def test_plain_values_are_what_they_look_like(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: 1e-3\nb: {c: [1, x]}\nd: &d {e: 1}\nf: *d\n")
    assert parse_file(tmp_path / "x.yaml") == {"a": 1e-3, "b": {"c": [1, "x"]}, "d": {"e": 1}, "f": {"e": 1}}
    (tmp_path / "empty.yaml").write_text("")
    assert parse_file(tmp_path / "empty.yaml") == {}
