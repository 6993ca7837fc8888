"""`twinmoe trace`, `simulate` and `plan` from the command line: reports, files, wrong requests in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twinmoe.moe_core import ConfigError, cli
from twinmoe.moe_core.synthetic import Skew
from twinmoe.moe_core.trace import Record
from twinmoe.moe_core.trace_make import Synthetic, write

SMALL = ("moe.num_experts=8", "moe.top_k=2", "model.num_layers=2", "train.sequence_length=64")
FAST = ("--cluster", "testbed_2x2_100mbit", "cluster.device_teraflops=0.02")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.run(words)
    out, err = capsys.readouterr()
    return status, out, err


def report(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    status, out, err = run(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def test_a_made_up_trace_is_shown_simulated_and_planned_with(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = str(tmp_path / "a.twtrace")
    sizes = ("--experts", "8", "--top-k", "2", "--ranks", "4", "--tokens", "64", "--layers", "2", "--steps", "2")
    made = report(capsys, "trace", "synth", "--skew", "hot:75:2", "--out", path, *sizes)
    assert made["records"] == 4
    shown = report(capsys, "trace", "show", path)
    assert (shown["steps"], shown["num_experts"], len(shown["layers"])) == (2, 8, 2)
    assert shown["layers"][0]["expert_imbalance"] == pytest.approx(3.0, rel=0.05)
    simulated = report(capsys, "simulate", "quickstart", *SMALL, *FAST, "--ranks", "4", "--trace", path)
    assert [row["scheme"].split(",")[0] for row in simulated["rows"]] == ["ep", "llep", "hiermoe", "laer", "fsdp_ep"]
    assert all(row["step_milliseconds"] > 0 for row in simulated["rows"])
    scheme = tmp_path / "mine.yaml"
    words = ("plan", "quickstart", *SMALL, *FAST, "--ranks", "4", "--trace", path, "--out", str(scheme))
    planned = report(capsys, *words)
    assert planned["winner"] == planned["rows"][0]["scheme"]
    assert len(planned["sentences"]) == 3
    assert scheme.is_file()
    assert run(capsys, *words)[0] == 2  # the file exists


def test_arrays_and_routing_traces_are_imported(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 8, (2, 4, 16, 2)))
    out = str(tmp_path / "b.twtrace")
    found = report(capsys, "trace", "import", str(tmp_path / "ids.npy"), "--experts", "8", "--out", out)
    assert (found["records"], found["ranks"]) == (2, 4)
    status, _, err = run(capsys, "trace", "import", str(tmp_path / "no.jsonl"), "--out", out)
    assert (status, "no file" in err) == (2, True)
    (tmp_path / "r.jsonl").write_text("{}\n")
    status, _, err = run(capsys, "trace", "import", str(tmp_path / "r.jsonl"), "--out", out)
    assert (status, "--experts" in err) == (2, True)


def test_rates_come_from_reports_of_bench_layer(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    row = {"ops": "fused", "hidden_size": 256, "expert_hidden_size": 512, "top_k": 2, "num_experts": 4}
    times = {"forward_milliseconds": 1.0, "milliseconds": 3.0, "optimizer_milliseconds": None, "parameters": 1}
    path = tmp_path / "layer.json"
    path.write_text(json.dumps({"tokens": 64, "rows": [{**row, **times}]}))
    words = ("simulate", "quickstart", *SMALL, "--ranks", "4", "--scheme", "ep", "--cluster", "dgx_h100")
    assert "bench layer" in report(capsys, *words, "--layer", str(path))["rates"]
    path.write_text("{}")
    status, _, err = run(capsys, *words, "--layer", str(path))
    assert (status, "bench layer --json" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("plan", "quickstart", "--ranks", "4"), "no link of the cluster one_host was measured"),
        (("plan", "quickstart", "--cluster", "a6000_4x8", "--ranks", "4"), "does not say how fast a device computes"),
        (("plan", "quickstart", *FAST, "--ranks", "4", "--skew", "often"), "skew"),
        (("simulate", "quickstart", *FAST, "--ranks", "4", "--trace", "nowhere"), "no trace at nowhere"),
        (("simulate", "latent_hp", *FAST, "--ranks", "4"), "heads"),
        (("trace", "show", "nowhere"), "no trace"),
        (("trace", "synth", "--skew", "hot:95:1", "--top-k", "4"), "distinct experts"),
        (("trace", "synth", "--top-k", "9", "--experts", "4"), "can't choose 9 distinct experts of 4"),
        (("trace", "synth", "--skew", "zipf:nan"), "the skew 'zipf:nan' is unknown"),
        (("trace", "synth", "--skew", "zipf:inf"), "the skew 'zipf:inf' is unknown"),
        (("trace", "synth", "--skew", "groups:4.5:2"), "groups takes whole numbers"),
        (("trace", "synth", "--seed", "-1"), "--seed"),
        (("trace", "synth", "--out", "absent/a.twtrace"), "there is no folder absent"),
        (("trace", "import", "pyproject.toml", "--out", "absent/a.twtrace"), "there is no folder absent"),
        (("trace", "synth", "--tokens", "1000000000"), "choose at most"),
        (("trace", "synth", "--ranks", "1000000000"), "--ranks"),
        (("simulate", "quickstart", *FAST, "--ranks", "1000000000000"), "--ranks"),
    ],
)
def test_wrong_requests_are_one_sentence(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str):
    status, _, err = run(capsys, *words)
    assert status == 2
    assert told in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("fault", [ConfigError("no"), MemoryError(), KeyboardInterrupt()])
def test_a_trace_that_could_not_be_made_leaves_no_file(tmp_path: Path, fault: BaseException):
    made = Synthetic(Skew.parse("balanced"), 4, 2, 2, 8)

    def records() -> Iterator[Record]:
        yield made.record(0, 0)
        raise fault

    with pytest.raises(type(fault)):
        write(tmp_path / "a.twtrace", made.info, records())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_record_trains_and_leaves_a_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    words = ("quickstart", *SMALL, "train.steps=2", "train.global_batch_size=2", "model.hidden_size=32")
    found = report(capsys, "trace", "record", *words, "--nproc", "2", "--run-dir", str(tmp_path / "run"))
    assert (found["steps"], found["ranks"], found["records"]) == (2, 2, 4)
    assert found["sampled_tokens"] == 128
