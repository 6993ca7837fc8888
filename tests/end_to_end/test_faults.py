"""What breaks, and how it ends, on real processes: with the promised status and message, in time, nothing left behind,
and nothing lost beyond the last step that was saved: the resumed run is the unbroken one, bit for bit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from twinmoe.moe_core.checkpoint import LATEST, Checkpoint
from twinmoe.testing.end_to_end.command import SMALL, Done, gone, prepare, report, train

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

TIMEOUT_S = 10
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
    Case(1, 3, "forward", "nan", 2, ("step 3: ", "--resume auto goes on from the last checkpoint")),
]
EVERY = [*KILLED, *RAISED, *SILENT, *OTHERS]
FEW = [killed(0, "rename"), silent("sleep", "backward", 60)]
"""Representatives, of which the quick tests make sure."""


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
