"""`twinmoe acceptance`: what a new machine should show before it is trusted, as one file to keep or to send.

The steps run in an order in which an early failure explains the later ones. Each has a limit of time, after which its
workers are ended and the next step begins; a failed step never hides the others.
"""

from __future__ import annotations

import json
import signal
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.registry import choose
from .acceptance_steps import STEPS, Bench, Step, StepFailedError
from .combinations import ConfigError
from .launch import check_local
from .run_folder import CHECKPOINTS
from .train_request import rank_count

TOTAL_S = 840.0
"""All steps together end within this."""
NOT_ASKED = (
    "a wrong split on one rank: time to an error, and whether the process ends",
    "groups used late or opened in another order, collectives from two threads",
    "memory of a communicator, and how many fit",
    "permutation near 2^24 rows",
    "a checkpoint of many ranks read by few, and across frameworks",
    "whether a process can go on after a bad index",
)
"""What a script should not do to a machine unasked, or can't see."""


@dataclass(frozen=True)
class AcceptanceRequest:
    """The command line of `acceptance`. limit_s: for all steps together."""

    out: Path = Path("bundle.tgz")
    backend: str | None = None
    nproc: str = "auto"
    limit_s: float = TOTAL_S


def run(request: AcceptanceRequest, tell: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """The JSON of `acceptance`; writes the bundle. Raises ConfigError, BackendError for a wrong request."""
    if request.out.exists():
        raise ConfigError(f"{request.out} exists; name another file with --out")
    if not request.out.resolve().parent.is_dir():
        raise ConfigError(f"there is no folder {request.out.parent}; make it or name another file with --out")
    choice = choose(request.backend)
    ranks = check_local(rank_count(request.nproc, choice.name))
    with tempfile.TemporaryDirectory(prefix="twinmoe_acceptance_") as name:
        bench = Bench(choice, ranks, Path(name))
        steps = list(_run_steps(bench, time.monotonic() + request.limit_s, tell))
        report = {
            "backend": choice.name,
            "decided_by": choice.decided_by,
            "ranks": ranks,
            "passed": all(step["status"] == "passed" for step in steps),
            "steps": steps,
            "not_asked": list(NOT_ASKED),
        }
        (bench.folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        _pack(bench.folder, request.out)
    return {**report, "bundle": str(request.out), "bytes": request.out.stat().st_size}


def lines(report: Mapping[str, Any]) -> list[str]:
    """What people read."""
    told = [f"{s['status']:7} {s['seconds']:6.1f} s  {s['name']}{_reason(s)}" for s in report["steps"]]
    outcome = "all steps passed" if report["passed"] else "not accepted"
    end = f"{outcome} on {report['backend']}, {report['ranks']} ranks; {report['bundle']} has the reports and logs"
    return [*told, end]


def _reason(step: Mapping[str, Any]) -> str:
    return f": {step['error'].splitlines()[0]}" if step["error"] else ""


def _run_steps(bench: Bench, deadline: float, tell: Callable[[str], object]) -> Iterator[dict[str, Any]]:
    for name, (step, limit_s) in STEPS.items():
        tell(name)
        began = time.monotonic()
        left = min(limit_s, deadline - began)
        record: dict[str, Any] = {"name": name, "status": "passed", "error": "", "report": {}}
        if left < 1:
            record |= {"status": "skipped", "error": "no time was left"}
        else:
            record |= _outcome(step, bench, left)
        yield {**record, "seconds": round(time.monotonic() - began, 2)}


def _outcome(step: Step, bench: Bench, limit_s: float) -> dict[str, Any]:
    try:
        with _limited(limit_s):
            return {"report": step(bench)}
    except StepFailedError as error:
        return {"status": "failed", "error": str(error), "report": error.report}
    except Exception as error:  # one step's failure is an answer, and the other steps still count
        return {"status": "failed", "error": str(error).strip() or type(error).__name__}


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds; whoever waits for workers then ends them."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s; its workers were ended")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _pack(folder: Path, out: Path) -> None:
    """Everything but checkpoints. ConfigError if the file can't be written."""

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return None if f"/{CHECKPOINTS}" in member.name else member

    try:
        with tarfile.open(out, "w:gz") as bundle:
            bundle.add(folder, arcname="twinmoe_acceptance", filter=wanted)
    except OSError as error:
        raise ConfigError(f"{out} can't be written ({error.strerror}); name another file with --out") from None
