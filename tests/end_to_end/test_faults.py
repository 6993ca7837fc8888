"""What breaks, and how it ends, on real processes: with the promised status and message, in time, nothing left behind,
and nothing lost beyond the last step that was saved: the resumed run is the unbroken one, bit for bit.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from twinmoe.moe_core.checkpoint import LATEST, Checkpoint
from twinmoe.testing.end_to_end.command import SMALL, Done, command, gone, prepare, report, train

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

TIMEOUT_S = 15
WORDS = ("train.steps=6", "train.save_every=2", f"train.timeout_s={TIMEOUT_S}", "--nproc", "2", "--run-dir")
SOON = 20.0
"""Seconds in which a job ends, beyond the timeout where that is what finds the fault."""


@dataclass(frozen=True)
class Case:
    """A fault and what it must end in. step: that of the checkpoint that is left; told: sentences on standard error."""

    rank: int
    step: int
    at: str
    do: str
    saved: int
    told: tuple[str, ...]
    seconds: float = SOON
    fault: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.do}-{self.at}-rank{self.rank}"


def after_the_first_save(at: str) -> int:
    """Saves are told by the step that would come next."""
    return 3 if at in ("forward", "backward") else 5


def killed(rank: int, at: str) -> Case:
    return Case(rank, after_the_first_save(at), at, "kill", 2, (f"rank {rank} was ended by SIGKILL",))


def raised(rank: int, at: str) -> Case:
    told = ("RuntimeError: the planted failure", f"rank {rank} failed; all ranks have ended")
    return Case(rank, after_the_first_save(at), at, "raise", 2, told)


def silent(do: str, at: str, seconds: float) -> Case:
    told = ("what each rank was doing", "rank 0 waits", "rank 1 ")
    return Case(1, 3, at, do, 2, told, SOON + TIMEOUT_S, {"seconds": seconds})


PLACES = [(rank, at) for at in ("forward", "backward", "save") for rank in (0, 1)] + [(0, "rename"), (0, "latest")]
KILLED = [killed(rank, at) for rank, at in PLACES]
RAISED = [raised(rank, at) for rank in (0, 1) for at in ("forward", "save")]
SILENT = [silent("sleep", "forward", 60), silent("sleep", "backward", 60), silent("stop", "forward", 0)]
OTHERS = [
    Case(1, 3, "forward", "memory", 2, ("rank 1 ran out of memory in layers.", "train.micro_batch_size")),
    Case(1, 3, "forward", "nan", 2, ("layer 1, sequence ", "moe.nan_policy=skip")),
]
EVERY = [*KILLED, *RAISED, *SILENT, *OTHERS]
FEW = [killed(0, "rename")]
"""What the quick tests make sure of, besides a full disk."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("faults"), SMALL)


@pytest.fixture(scope="module")
def unbroken(home: Path) -> list[float]:
    return report(train(home, *WORDS, "unbroken", "--json"))["losses"]


def break_it(home: Path, case: Case) -> Done:
    """The faulty run; it ends in time."""
    order = {"rank": case.rank, "step": case.step, "at": case.at, "do": case.do, **case.fault}
    done = train(home, *WORDS, case.name, fault=order, seconds=120)
    since = time.time() - float((home / f"{case.name}.fault.time").read_text())
    assert since < case.seconds, f"it took {since:.0f} s to end"
    return done


def latest(run_dir: Path) -> Checkpoint:
    return Checkpoint(run_dir / "checkpoints" / (run_dir / LATEST).read_text().strip())


def check(home: Path, case: Case, unbroken: list[float]) -> None:
    done = break_it(home, case)
    assert done.returncode == 1, done.stderr
    for sentence in case.told:
        assert sentence in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") <= 1 + done.stderr.count("direct cause")
    assert gone(home)
    assert latest(home / case.name).step == case.saved
    resumed = report(train(home, *WORDS, case.name, "--resume", "auto", "--json"))
    assert resumed["resumed"]["step"] == case.saved
    assert resumed["losses"] == unbroken
    assert not list((home / case.name / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_a_fault_ends_as_promised(home: Path, unbroken: list[float], case: Case) -> None:
    check(home, case, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in EVERY if c not in FEW], ids=lambda case: case.name)
def test_every_fault_ends_as_promised(home: Path, unbroken: list[float], case: Case) -> None:
    check(home, case, unbroken)


# --- runs that go on, or end in order -----------------------------------------------------------------
def test_a_full_disk_leaves_the_last_checkpoint_and_training_goes_on(home: Path, unbroken: list[float]) -> None:
    """A small file system of its own around the run folder: one checkpoint fits on it, two do not."""
    done = on_small_disk(home, "full", 420)
    assert done.returncode == 0, done.stderr
    summary = report(done)
    assert summary["losses"] == unbroken
    assert len(summary["warnings"]) == 2
    assert summary["late_warnings"] == summary["warnings"][1:], "that of the last step"
    assert all("was NOT written: No space left on device" in told for told in summary["warnings"])
    assert "the last checkpoint is step_00000002" in summary["warnings"][0]
    assert latest(home / "full" / "run").step == 2
    assert [path.name for path in (home / "full" / "run" / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.slow
def test_a_run_that_is_asked_to_save_and_cannot_does_not_end_well(home: Path) -> None:
    done = on_small_disk(home, "too_small", 240, fault={"rank": 1, "step": 3, "at": "forward", "do": "term"})
    assert done.returncode == 1
    assert "NotSavedError: the checkpoint of step 3 was NOT written: No space left on device" in done.stderr
    assert gone(home)


def on_small_disk(home: Path, name: str, kibibytes: int, fault: dict[str, Any] | None = None) -> Done:
    """Train in a mount namespace whose HOME/disk is that small; what was on the disk is copied to HOME/NAME."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    (home / "disk").mkdir(exist_ok=True)
    script = (
        f"mount -t tmpfs -o size={kibibytes}k tmpfs disk || exit 99; "
        f'"$@"; status=$?; rm -rf {name}; cp -r disk {name}; exit $status'
    )
    words = command(*WORDS, "disk/run", "--json", fault=fault)
    around = ["unshare", "-rm", "sh", "-c", script, "sh", *words]
    return subprocess.run(around, cwd=home, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_saves_on_all_and_exits_0(home: Path, unbroken: list[float], rank: int) -> None:
    """As a batch system sends it; in the middle of a step of one rank."""
    name = f"term{rank}"
    fault = {"rank": rank, "step": 3, "at": "backward", "do": "term"}
    stopped = report(train(home, *WORDS, name, "--json", fault=fault))
    assert stopped["stopped_early"]
    assert latest(home / name).step == stopped["steps"] == 3
    assert gone(home)
    assert report(train(home, *WORDS, name, "--resume", "auto", "--json"))["losses"] == unbroken


@pytest.mark.slow
def test_a_bad_step_is_skipped_and_counted_where_that_is_asked(home: Path) -> None:
    fault = {"rank": 1, "step": 3, "at": "forward", "do": "nan"}
    summary = report(train(home, *WORDS, "skipped", "train.on_nan=skip", "--json", fault=fault))
    assert summary["skipped_steps"] == 1
    assert summary["losses"][2] is None
    assert all(loss is not None for n, loss in enumerate(summary["losses"]) if n != 2)
    assert "step 3 was skipped (1 in this run)" in summary["warnings"][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS", "rank_00000.safetensors", "rank_00001.safetensors"])
def test_a_corrupted_byte_is_refused_and_the_older_checkpoint_taken(
    home: Path, unbroken: list[float], name: str
) -> None:
    run, newest = home / f"damaged_{name}", home / f"damaged_{name}" / "checkpoints" / "step_00000006"
    shutil.copytree(home / "unbroken", run)
    data = bytearray((newest / name).read_bytes())
    data[len(data) // 2] ^= 1
    (newest / name).write_bytes(data)
    refused = train(home, *WORDS, f"{run.name}_2", "--resume", str(newest))
    assert refused.returncode == 2
    assert str(newest) in refused.stderr
    assert refused.stderr.count("\n") == 1, "one sentence"
    resumed = report(train(home, *WORDS, run.name, "--resume", "auto", "--json"))
    assert resumed["resumed"]["step"] == 4
    assert "skipped" in resumed["resumed"]["notes"][0]
    assert resumed["losses"] == unbroken
