"""Any config either trains a step or is refused in one sentence; any text is a config or is refused in one sentence."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twinmoe.backends.protocol import Launch
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.backends.registry import load
from twinmoe.moe_core.combinations import ConfigError, check_ranks
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import Config, Section
from twinmoe.moe_core.planners.budget import RowBudgetError
from twinmoe.moe_core.train import run
from twinmoe.testing.end_to_end.resume_runs import config as tiny_config
from twinmoe.testing.end_to_end.resume_runs import write_text

FIXED = {
    "name": "what a run is called",
    "backend": "this process has one",
    "train.trackers": "programs of others",
    "train.timeout_s": "of real processes",
    "model.init_from": "a folder",
    "model.layer_shape_only": "not for training",
    "data.tokenizer": "a file",
}
"""Fields that are left alone."""
INTEGERS = (-1, 0, 1, 2, 3, 4, 5, 8, 12, 300)
FLOATS = (-1.0, 0.0, 1e-3, 0.5, 1.0, 2.0, 1e30)
NONSENSE = ("", "nonsense", [1], {"a": 1}, True, 1.5, None, "1/0")


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of the config by its dotted name, and its type."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from fields(kind, f"{prefix}{name}.")
        elif prefix + name not in FIXED:
            yield prefix + name, kind


def values(kind: Any) -> list[Any]:
    """Some of the type, right and wrong."""
    origin = get_origin(kind)
    if origin is Literal:
        return list(get_args(kind))
    if origin in (Union, UnionType):
        return [value for part in get_args(kind) for value in values(part)]
    if origin is not None and origin is not tuple:
        return values(get_args(kind)[0])
    plain: Mapping[Any, list[Any]] = {
        bool: [True, False],
        int: list(INTEGERS),
        float: list(FLOATS),
        type(None): [None],
        str: ["1.25"],
    }
    return plain.get(kind, [[], [0], ["3/2"], 2])


FIELDS = dict(fields(Config))
FITTING = {name: values(kind) for name, kind in FIELDS.items()}
ROUTERS = ("topk", "switch", "grap", "nonsense")
FITTING["moe.router"] = list(ROUTERS)
FITTING["data.paths"] = [[], ["no such file"]]
FITTING["parallel.scheme"] = ["ep", "llep", "laer", "hiermoe", "custom", "nonsense"]


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    """(ranks, values by field); now and then one that cannot be right, or a field that is not there."""
    names = draw(st.lists(st.sampled_from(sorted(FITTING)), max_size=6, unique=True))
    told = {name: draw(st.sampled_from(FITTING[name])) for name in names}
    if draw(st.integers(0, 9)) == 0:
        told[draw(st.sampled_from(sorted(FIELDS)))] = draw(st.sampled_from(NONSENSE))
    if draw(st.integers(0, 19)) == 0:
        told[draw(st.sampled_from(["moe.top", "trian.steps", "model", "moe", "x"]))] = draw(st.sampled_from(NONSENSE))
    return draw(st.sampled_from((1, 2, 4))), told


def attempt(ranks: int, told: Mapping[str, Any], text: Path) -> str:
    """'trained', or the sentence by which the request was refused. Anything else is raised."""
    merged = {**tiny_config("ep", text, steps=1, save_every=0, validation_batches=1), "name": "fuzz"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "logs").mkdir()
        try:
            config = load_config({**merged, **told, "train.steps": 1})
            check_ranks(config, ranks)
            ran = run_ranks(
                ranks, lambda comm: run(config, load("reference"), Launch(comm.rank, ranks), Path(folder)), 60
            )
        except (ConfigError, RowBudgetError) as error:  # the second where parallel.over_budget=error asks for it
            return str(error)
    assert ran[0]["steps"] == 1
    assert all(summary == ran[0] or summary["losses"] == ran[0]["losses"] for summary in ran)
    assert math.isfinite(ran[0]["losses"][0])
    return "trained"


def check(request: tuple[int, dict[str, Any]], text: Path, seen: Counter[str]) -> None:
    told = attempt(*request, text)
    seen["trained" if told == "trained" else "refused"] += 1
    assert told
    assert "\n" not in told


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("fuzz") / "text.txt")


def fuzz(text: Path, examples: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=examples, suppress_health_check=quiet)
    @given(requests())
    def any_request(request: tuple[int, dict[str, Any]]) -> None:
        check(request, text, seen)

    any_request()
    print(f"configs tried: {sum(seen.values())}, {dict(seen)}")
    return seen


def test_a_config_trains_a_step_or_is_refused_in_one_sentence(text: Path) -> None:
    seen = fuzz(text, 60)
    assert min(seen["trained"], seen["refused"]) > 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_configs_train_a_step_or_are_refused_in_one_sentence(text: Path) -> None:
    fuzz(text, 3000)


# --- texts -----------------------------------------------------------------------------------------
PIECES = (
    *("train:\n", "  steps: 3\n", "moe: {top_k: 1", "}\n", "[", "]", "{", "}", ": ", "- ", "? ", ", ", "\n", "\t", " "),
    *("&a ", "*a", "<<: *a\n", "---\n", "%YAML 1.1\n", "!!python/object/apply:os.abort []", "!!binary aGk="),
    *("2001-01-01", ".inf", ".nan", "1e400", "0x1F", "1_000", "~", "null", "yes", "'", '"', "|\n", "\0", "\x85", "#"),
    *("base: quickstart\n", "base: ../x\n", "model: {}\n", "model: mixtral-8x7b\n", "name: x\n", "!!set {a}"),
    "parallel: {scheme: llep}\n",
)
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=12).map("".join)


def what_is_told(source: Any, words: tuple[str, ...] = ()) -> str:
    try:
        load_config(source, words)
    except ConfigError as error:
        return str(error)
    return "a config"


def fuzz_texts(folder: Path, examples: int) -> None:
    path = folder / "fuzz.yaml"

    @settings(max_examples=examples)
    @given(TEXTS, st.booleans())
    def any_text(text: str, as_bytes: bool) -> None:
        path.write_bytes(text.encode("utf-8" if not as_bytes else "utf-16", "surrogatepass"))
        told = what_is_told(path), what_is_told("quickstart", (text,)), what_is_told("quickstart", (f"train={text}",))
        assert all(told)
        assert not any("\n" in sentence for sentence in told)

    any_text()
    print(f"texts tried: {examples}, as a file, a word and a value")


def test_any_text_is_a_config_or_is_refused_in_one_sentence(tmp_path: Path) -> None:
    fuzz_texts(tmp_path, 150)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_texts_are_configs_or_are_refused_in_one_sentence(tmp_path: Path) -> None:
    fuzz_texts(tmp_path, 4000)
