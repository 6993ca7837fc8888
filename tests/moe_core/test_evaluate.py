"""The loss of a checkpoint by domain: the validation loss of training, whatever runs it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from twinmoe.backends.protocol import Launch
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.backends.registry import load
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.data import open_data
from twinmoe.moe_core.evaluate import EVERYTHING, run_rank
from twinmoe.moe_core.evaluate_request import EvaluateRequest, config_of, lines
from twinmoe.testing.end_to_end.resume_runs import TINY, config, virtual, write_text

RANKS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run on two domains of unlike length, in ep on two virtual ranks, with biases that routers learned."""
    folder = tmp_path_factory.mktemp("eval")
    texts = [write_text(folder / "a.txt"), folder / "b.txt"]
    texts[1].write_text("shorter: " + " ".join(str(n * n) for n in range(400)))
    one = copy.deepcopy(TINY)
    one["train"] |= {"steps": 2, "validation_batches": 9}
    one["data"] |= {"paths": [str(text) for text in texts], "validation_fraction": 0.05}
    summary = virtual(RANKS, {"config": one, "run_dir": str(folder / "run"), "resume": None})
    return folder / "run", summary


def evaluated(folder: Path, run_dir: Path, ranks: int = RANKS, **request: Any) -> dict[str, Any]:
    asked = EvaluateRequest(folder, **request)
    options = {
        "config": config_of(asked).model_dump(mode="json"),
        "of": EVERYTHING if asked.data else "held out",
        "batches": asked.batches,
    }
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    backend = load("reference")
    return run_ranks(ranks, lambda comm: run_rank(backend, Launch(comm.rank, ranks), options, run_dir), 120)[0]


@pytest.fixture(scope="module")
def plain(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """On one rank, and on two by plain expert parallelism."""
    return [evaluated(trained[0], tmp_path_factory.mktemp("plain"), ranks) for ranks in (1, RANKS)]


def test_the_sum_over_domains_is_the_validation_loss_of_training(trained: Any, tmp_path: Path) -> None:
    run, summary = trained
    report = evaluated(run, tmp_path, batches=9)
    assert report["loss"] == pytest.approx(summary["validation_loss"], rel=1e-12)
    assert (report["step"], report["model_hash"]) == (2, summary["model_hash"])
    assert (report["data_hash"], report["world_size"]) == (summary["data_hash"], RANKS)
    first, second = report["domains"]
    whole = first["loss"] * first["targets"] + second["loss"] * second["targets"]
    assert whole / report["targets"] == pytest.approx(report["loss"], rel=1e-12)
    assert first["loss"] != pytest.approx(second["loss"], rel=1e-3)
    assert "all" in lines({**report, "of": "held out"})[-2]


@pytest.mark.parametrize("scheme", ["llep", "laer", "hiermoe"])
def test_the_loss_does_not_depend_on_the_scheme_or_the_ranks(
    trained: Any, plain: list[dict[str, Any]], tmp_path: Path, scheme: str
) -> None:
    words = (f"parallel.scheme={scheme}", "parallel.least_loaded.min_rows=1", "parallel.slots_per_rank=3")
    words += ("parallel.placement=fixed",) if scheme == "hiermoe" else ()
    one, other = plain
    there = evaluated(trained[0], tmp_path, overrides=words)
    for report in (other, there):
        assert report["loss"] == pytest.approx(one["loss"], rel=1e-12)
        assert [d["loss"] for d in report["domains"]] == pytest.approx([d["loss"] for d in one["domains"]], rel=1e-12)
    assert there["scheme"] != other["scheme"]


def test_other_data_count_whole_or_up_to_a_number_of_batches(trained: Any, tmp_path: Path) -> None:
    text = write_text(tmp_path / "other.txt")
    report = evaluated(trained[0], tmp_path / "job", data=(str(text),))
    assert report["targets"] == len(text.read_bytes()) + 1, "every byte and the end"
    assert [d["domain"] for d in report["domains"]] == [str(text)]
    short = evaluated(trained[0], tmp_path / "job", data=(str(text),), batches=2)
    assert short["domains"][0]["sequences"] == 2 * 4


def test_without_a_number_every_held_out_token_counts_once(trained: Any, plain: list[dict[str, Any]]) -> None:
    config = config_of(EvaluateRequest(trained[0]))
    data = open_data(config.data, config.train)
    held = [sum(s.positions for p in data._validation for s in p.streams if s.domain == d) for d in (0, 1)]
    assert [d["targets"] for d in plain[0]["domains"]] == held


def test_requests_that_lead_nowhere_are_refused(trained: Any, tmp_path: Path) -> None:
    for asked, told in (
        (EvaluateRequest(tmp_path / "none"), "no folder"),
        (EvaluateRequest(tmp_path), "no checkpoint"),
        (EvaluateRequest(trained[0], data=("nosuch.txt",)), "--data: no file"),
        (EvaluateRequest(trained[0], ("moe.top_k=3",)), "moe.top_k"),
    ):
        with pytest.raises(ConfigError, match=told):
            evaluated(asked.checkpoint, tmp_path / "job", overrides=asked.overrides, data=asked.data)


def test_a_model_of_others_must_be_given_data(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(ConfigError, match="name texts with --data"):
        config_of(EvaluateRequest(tmp_path))


def test_the_layouts_of_resuming_are_evaluated_alike(tmp_path: Path) -> None:
    """A checkpoint that fully sharded ranks wrote, read by one rank that owns everything."""
    text = write_text(tmp_path / "text.txt")
    one = config("laer", text, steps=2)
    summary = virtual(RANKS, {"config": one, "run_dir": str(tmp_path / "run"), "resume": None})
    report = evaluated(tmp_path / "run", tmp_path / "job", 1, overrides=("parallel.scheme=ep",), batches=1)
    assert report["loss"] == pytest.approx(summary["validation_loss"], rel=1e-12)
