"""The command line keeps its word: documented commands, exit statuses, one sentence for a wrong request."""

from __future__ import annotations

import itertools
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from twinmoe.backends import registry
from twinmoe.backends.registry import FLAG
from twinmoe.moe_core import cli, train_request
from twinmoe.moe_core.launch import JobFailedError
from twinmoe.moe_core.metrics import METRICS

README = Path(__file__).parents[2] / "README.md"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run one command line in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(FLAG, raising=False)
    for variable in ("RANK", "WORLD_SIZE", "MS_ROLE"):
        monkeypatch.delenv(variable, raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        status = cli.run(words)
        told = capsys.readouterr()
        return status, told.out, told.err

    return call


def refused(outcome: tuple[int, str, str]) -> str:
    """The sentence of a wrong request."""
    status, out, err = outcome
    assert status == 2
    assert "Traceback" not in err
    assert err.startswith("twinmoe: ")
    assert err.count("\n") == 1, "one sentence"
    assert out == ""
    return err


# --- wrong requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["absent.yaml"], "there is no file 'absent.yaml'"),
        (["absent"], "there is no packaged name 'absent'"),
        (["quickstart", "train.stepz=3"], "did you mean train.steps?"),
        (["quickstart", "train.steps=many"], "it should be a valid integer"),
        (["quickstart", "parallel.planner=relayout"], "do not combine"),
        (["quickstart", "moe.top_k=9"], "choose top_k <= num_experts"),
        (["quickstart", "--nproc", "32"], "use at most 16 ranks"),
        (["quickstart", "--nproc", "3"], "can't be shared equally by 3 ranks"),
        (["quickstart", "--nproc", "some"], "neither a positive number nor auto"),
        (["quickstart", "--nproc", "0"], "neither a positive number nor auto"),
        (["quickstart", "backend=npu"], "unknown backend 'npu' (from the command line); choose one of"),
        (["quickstart", "--resume", "auto"], "name its folder with --run-dir"),
        (["quickstart", "--port", "99999"], "port 99999 does not exist"),
        (["quickstart", "--speed", "9"], "--speed"),
        (["deepseek-v3"], "is the shape of a layer"),
        (["quickstart", "name=../../x"], "can't be part of a folder's name"),
        (["quickstart", "name="], "name"),
        (["quickstart", "model.sliding_layers=[99]"], "name layers that the model has"),
        (["quickstart", "model.sliding_layers=[-1]"], "name layers that the model has"),
        (["quickstart", "moe.locality_expert_nodes=[7,7]"], "numbers below locality_nodes, or null"),
        (["quickstart", "data.source=hf", "data.dataset=a", "data.paths=[b]"], "take one out"),
        (["quickstart", "train.global_batch_size=1000000007", "--nproc", "1000000007"], "local processes"),
        ([], "CONFIG"),
    ],
)
def test_a_wrong_train_request_exits_2_with_one_sentence(run: Run, words: list[str], told: str) -> None:
    assert told in refused(run("train", *words))
    assert not Path("runs").exists(), "nothing was started"


def test_a_port_in_use(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        sentence = refused(run("train", "quickstart", "--port", str(taken.getsockname()[1])))
    assert "leave --port out" in sentence
    assert not Path("runs").exists()


def test_an_existing_run_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / METRICS).write_text("{}\n")
    assert "continue it with --resume auto" in refused(run("train", "quickstart", "--run-dir", "old"))


@pytest.mark.parametrize("folder", [None, "mine", "a/b/c"])
def test_a_wrong_request_that_a_worker_finds_leaves_no_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str | None
) -> None:
    def fail(*_: object) -> None:
        raise JobFailedError("there is no such file", request=True)

    monkeypatch.setattr(train_request, "run_job", fail)
    words = ["train", "quickstart", *(["--run-dir", folder] if folder else [])]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kept").touch()
    status, _, err = run(*words)
    assert (status, err) == (2, "twinmoe: there is no such file\n")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "kept"]


def test_a_folder_that_was_there_stays_after_a_wrong_request(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise JobFailedError("no", request=True)

    monkeypatch.setattr(train_request, "run_job", fail)
    (tmp_path / "mine").mkdir()
    assert run("train", "quickstart", "--run-dir", "mine")[0] == 2
    assert (tmp_path / "mine").is_dir()


def test_an_unknown_backend_in_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FLAG, "tpu")
    assert f"unknown backend 'tpu' (from the environment ({FLAG}))" in refused(run("train", "quickstart"))


def test_more_ranks_than_devices(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_request, "probe", lambda name: registry.Probe(True, "two cards", {}, devices=2))
    assert "use --nproc 2, or backend=cpu" in refused(run("train", "quickstart", "--nproc", "4"))


def test_under_a_launcher_the_ranks_must_agree_on_the_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "give --run-dir" in refused(run("train", "quickstart"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dance"], "No such command 'dance'"),
        (["configs", "show", "absent"], "`twinmoe configs list` names them"),
        (["verify", "--level", "fast"], "choose one of quick, standard, full"),
        (["verify", "--worlds", "two"], "--worlds 2,4"),
        (["verify", "--dtype", "int8"], "choose one of float64"),
        (["verify", "--backend", "tpu"], "unknown backend 'tpu'"),
        (["launch", "quickstart", "--print", "mpirun"], "choose one of torchrun, msrun, slurm"),
        (["launch", "quickstart", "--nodes", "0"], "--nodes"),
        (["launch", "quickstart", "--nodes", "1000000000", "--nproc", "1000000000"], "use at most 16 ranks"),
        (["verify", "--worlds", "1000000"], "local processes"),
        (["bench", "comm", "--nproc", "1000000"], "local processes"),
        (["bench", "comm", "--out", "absent/a.yaml"], "there is no folder absent"),
        (["bench", "schemes", "--tokens", "0"], "--tokens 0 is not a size"),
        (["bench", "schemes", "--tokens", "-1"], "--tokens -1 is not a size"),
        (["bench", "schemes", "--tokens", "1000000000000"], "choose at most"),
        (["bench", "schemes", "--dtype", "float16"], "choose one of float32, bfloat16, float64"),
        (["bench", "schemes", "--skew", "zipf:inf"], "is unknown"),
        (["bench", "schemes", "--top-k", "0"], "is not a size"),
        (["compare", "quickstart", "--csv", "absent/a.csv"], "there is no folder absent"),
        (["compare", "quickstart", "--latex", "absent/a.tex"], "there is no folder absent"),
        (["compare", "quickstart", "--peak-tflops", "0"], "--peak-tflops 0"),
        (["compare", "quickstart", "--peak-tflops", "nan"], "--peak-tflops nan"),
        (["plan", "quickstart", "--out", "absent/a.yaml"], "there is no folder absent"),
        (["report", "nowhere", "--out", "absent/a.html"], "there is no folder absent"),
        (["launch", "quickstart", "--nodes", "4", "--nproc", "8"], "use at most 16 ranks"),
        (["data", "export", "quickstart", "data.source=text"], "name them in data.paths"),
    ],
)
def test_other_wrong_requests(run: Run, words: list[str], told: str) -> None:
    assert told in refused(run(*words))


def test_work_that_fails_exits_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise JobFailedError("rank 1 failed; all ranks have ended\nTraceback\nValueError: x")

    monkeypatch.setattr(train_request, "run_job", fail)
    status, _, err = run("train", "quickstart", "--nproc", "2")
    assert status == 1
    assert err.count("Traceback") == 1


# --- right requests ------------------------------------------------------------------------------


def test_doctor_keys(run: Run) -> None:
    status, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert status == 0
    assert {"chosen", "decided_by", "backends", "extra", "versions"} <= set(report)
    assert set(report["backends"]) == set(registry.NAMES) - {"auto"}
    for told in report["backends"].values():
        assert {"available", "reason", "versions", "remedy"} <= set(told)
        assert told["available"] or told["remedy"]
    assert report["backends"][report["chosen"]]["available"]


def test_doctor_for_people(run: Run) -> None:
    status, out, _ = run("doctor")
    assert status == 0
    assert out.splitlines()[-1].startswith("would run: ")


def test_dry_run_prints_the_merged_file_and_sizes_and_starts_nothing(run: Run) -> None:
    status, out, _ = run("train", "mixtral-8x7b", "backend=cpu", "--nproc", "8", "--dry-run")
    assert status == 0
    assert "num_experts: 8" in out
    assert "# parameters 46.7 G, 12.9 G of them active for a token" in out
    status, out, _ = run("train", "qwen3-30b-a3b", "backend=cpu", "--nproc", "8", "--dry-run", "--json")
    report = json.loads(out)
    assert report["parameters_total"] == pytest.approx(30.5e9, rel=2e-3)
    assert {"parameters_active", "memory_per_rank", "bytes_per_step", "config", "mesh"} <= set(report)
    assert not Path("runs").exists()


def test_configs_list_show_copy(run: Run) -> None:
    listed = json.loads(run("configs", "list", "--json")[1])
    assert "quickstart" in listed["experiment"]
    assert {"mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b", "gpt-oss-120b", "deepseek-v3"} <= set(listed["model"])
    assert {"ep", "fsdp_ep", "llep", "hiermoe", "laer", "groupwise"} <= set(listed["scheme"])
    assert run("configs", "copy", "quickstart")[0] == 0
    assert Path("quickstart.yaml").read_text() == run("configs", "show", "quickstart")[1]
    assert "exists; name another file" in refused(run("configs", "copy", "quickstart"))
    assert run("train", "quickstart.yaml", "backend=cpu", "--dry-run")[0] == 0


@pytest.mark.parametrize("launcher", ["torchrun", "msrun", "slurm"])
def test_launch_text(run: Run, launcher: str) -> None:
    status, out, _ = run("launch", "quickstart", "train.steps=7", "--nodes", "2", "--nproc", "4", "--print", launcher)
    assert status == 0
    assert out.startswith("#!/bin/sh\n")
    assert "train quickstart train.steps=7 --run-dir runs/job" in out
    for wanted in {"torchrun": ("--nnodes=2", "=4"), "msrun": ("--worker_num=8",), "slurm": ("--nodes=2", "srun")}[
        launcher
    ]:
        assert wanted in out
    assert ('export HCCL_EXEC_TIMEOUT="${HCCL_EXEC_TIMEOUT:-1800}"' in out) == (launcher == "msrun")


def test_data_export_can_be_trained_from(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text to train on. " * 400)
    source = ["quickstart", "data.source=text", "data.paths=[text.txt]", "train.sequence_length=32"]
    status, out, _ = run("data", "export", *source, "--out", "tokens", "--json")
    assert status == 0
    report = json.loads(out)
    assert {"folder", "data_hash", "vocab_size"} <= set(report)
    assert "choose another folder" in refused(run("data", "export", *source, "--out", "tokens"))


def test_table_lines() -> None:
    assert cli.table_lines([{"a": 1, "b": 0.123456}, {"a": 22, "c": "x"}]) == [
        " a       b  c",
        " 1  0.1235  -",
        "22       -  x",
    ]
    assert cli.table_lines([]) == ["no rows"]


# --- the documented commands ---------------------------------------------------------------------


def commands(run: Run, *path: str) -> set[str]:
    """Commands that --help lists, sub-commands included."""
    out = run(*path, "--help")[1]
    names = re.findall(r"^  ([a-z][a-z-]*)(?:  |$)", out.partition("Commands:")[2], re.MULTILINE)
    return {" ".join([*path, name]) for name in names} if names else set()


def documented() -> dict[str, list[str]]:
    """README's table: command -> options that it names."""
    table: dict[str, list[str]] = {}
    for cell in re.findall(r"^\| `twinmoe ([^`]+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE):
        command = " ".join(itertools.takewhile(re.compile("[a-z][a-z-]*$").match, cell.split()))
        table[command] = re.findall(r"--[a-z-]+", cell)
    return table


def test_help_equals_the_documented_table(run: Run) -> None:
    found = set()
    for command in commands(run):
        found |= commands(run, command) or {command}
    assert set(documented()) == found


def test_documented_options_exist_and_all_take_json(run: Run) -> None:
    for command, options in documented().items():
        help_text = run(*command.split(), "--help")[1]
        for option in [*options, "--json"]:
            assert option in help_text, f"{command}: {option}"


def test_checks_that_fail_are_exit_status_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from twinmoe.moe_core import verify_request

    failed = {"failed": 1, "failures": [], "passed": 0, "cases": 1, "backends": ["cpu"], "world_sizes": [2]}
    monkeypatch.setattr(verify_request, "verify", lambda request: {**failed, "worst_relative_error": 1.0})
    assert run("verify", "--level", "quick")[0] == 1
