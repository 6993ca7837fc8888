"""The steps of `twinmoe acceptance`, each a report or a StepFailedError."""

from __future__ import annotations

import glob
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..backends.registry import HOMES, Choice, home_environment, launcher_name
from . import bench_comm, bench_planner, bench_schemes_request, doctor
from .bench_job import Where
from .launch import Job, free_port, run_job
from .metrics import read_metrics
from .run_folder import LOGS
from .train_request import TrainRequest, resolve, start
from .verify_request import VerifyRequest, verify
from .worker import Order

TRAINING_STEPS = 20
TOLERANCE = 1e-4
"""Relative difference of losses that another order of float32 sums may make in so many steps."""

_LAYER_S = 120.0
_SOON = {"connect_timeout_s": 120, "execute_timeout_s": 125}
"""What HCCL is told in the checks: its own error, with its code, comes before the end of the step."""

_MACHINE = (("npu-smi", "info"), ("nvidia-smi",), ("lscpu",), ("uname", "-srm"))
_VERSION_FILES = (
    "/usr/local/Ascend/driver/version.info",
    "/usr/local/Ascend/firmware/version.info",
    "/usr/local/Ascend/*/latest/version.cfg",
    "/usr/local/Ascend/cann/version.cfg",
)


@dataclass(frozen=True)
class Bench:
    """What the steps share. folder: becomes the bundle."""

    choice: Choice
    ranks: int
    folder: Path

    @property
    def where(self) -> Where:
        return Where(str(self.ranks), self.choice.name)

    @property
    def has_device(self) -> bool:
        return bool(HOMES[self.choice.name].device_files)


Step = Callable[[Bench], Mapping[str, Any]]


class StepFailedError(Exception):
    """A step ran and its answer is wrong; `report` goes into the bundle."""

    def __init__(self, told: str, report: Mapping[str, Any]) -> None:
        super().__init__(told)
        self.report = report


def _machine(bench: Bench) -> dict[str, Any]:
    """Versions of everything below us, as the machine's own tools and files tell them."""
    tools = {}
    for words in _MACHINE:
        if shutil.which(words[0]):
            done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
            tools[" ".join(words)] = done.stdout[:20000]
    paths = sorted(path for pattern in _VERSION_FILES for path in glob.glob(pattern))
    files = {path: Path(path).read_text(encoding="utf-8", errors="replace")[:4000] for path in paths}
    return {"tools": tools, "files": files, "worker_environment": home_environment(bench.choice.name)}


def _checks(bench: Bench) -> dict[str, Any]:
    folder = bench.folder / "checks"
    (folder / LOGS).mkdir(parents=True)
    order = Order("acceptance", folder, bench.choice.name, bench.choice.decided_by, {"timeout_s": 60.0})
    report = run_job(Job(order, bench.ranks, launcher_name(bench.choice.name), free_port(), _SOON), _Silent())
    wrong = [check["name"] for check in report["checks"] if check["status"] == "failed"]
    if wrong:
        raise StepFailedError(f"{len(wrong)} of {len(report['checks'])} checks failed: {', '.join(wrong)}", report)
    return report


class _Silent:
    def poll(self) -> None:
        """Nothing is shown while checks run."""


def _verify(bench: Bench) -> dict[str, Any]:
    """In float64 on a host, in float32 on a device: NPUs have no float64 products."""
    dtype = "float32" if bench.has_device else "float64"
    report = verify(VerifyRequest("quick", str(min(2, bench.ranks)), (bench.choice.name,), dtype))
    if report["failed"]:
        raise StepFailedError(f"{report['failed']} of {report['cases']} cases differ from the oracle", report)
    return report


def _bench_planner(_: Bench) -> dict[str, Any]:
    return bench_planner.run(bench_planner.CASES[:2], repeats=3)


def _bench_layer(bench: Bench) -> dict[str, Any]:
    """Fused operations beside plain ones, in a process of its own: the device is free again afterwards."""
    words = [sys.executable, "-m", f"{__package__}.cli", "bench", "layer", "--backend", bench.choice.name, "--json"]
    words += ["--dtype", "bfloat16" if bench.has_device else "float32", "--repeats", "5"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_LAYER_S, check=False)
    if done.returncode:
        raise StepFailedError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no answer",
            {"stderr": done.stderr[-20000:]},
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _bench_schemes(bench: Bench) -> dict[str, Any]:
    request = bench_schemes_request.SchemesRequest(bench.where, ("ep", "llep"), ("balanced", "hot:75:8"), repeats=3)
    return bench_schemes_request.run(request)


def _bench_comm(bench: Bench) -> dict[str, Any]:
    sizes = bench_comm.SIZES[::2]
    return bench_comm.run(bench_comm.CommRequest(bench.where, None, True, None, sizes, repeats=3))


def _train(bench: Bench, name: str, *words: str) -> tuple[dict[str, Any], list[float]]:
    """Twenty steps of a small quick-start in a folder of the bundle: (summary, losses)."""
    reduced = {
        "backend": bench.choice.name,
        "train.steps": TRAINING_STEPS,
        "train.warmup_steps": 5,
        "train.global_batch_size": 2 * bench.ranks,
        "train.sequence_length": 64,
        "model.hidden_size": 64,
        "model.num_layers": 2,
        "moe.expert_hidden_size": 64,
    }
    run_dir = bench.folder / "runs" / name
    overrides = (*(f"{key}={value}" for key, value in reduced.items()), *words)
    resolved = resolve(TrainRequest("quickstart", overrides, str(bench.ranks), run_dir))
    summary = start(replace(resolved, choice=bench.choice), Console(quiet=True))
    return summary, [float(record["loss"]) for record in read_metrics(run_dir)]


def _training(bench: Bench) -> dict[str, Any]:
    summary, losses = _train(bench, "first")
    report = {"summary": summary, "losses": losses}
    if not losses[-1] < losses[0]:
        raise StepFailedError(f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g}", report)
    return report


def _same_seed(bench: Bench) -> dict[str, Any]:
    """Losses of a second run, which should be the same numbers."""
    _, losses = _train(bench, "second")
    worst = _worst(bench, losses)
    if worst:
        raise StepFailedError(f"a second run with the same seed differs by {worst:.3g}", {"losses": losses})
    return {"losses": losses, "relative_difference": worst}


def _recomputed(bench: Bench) -> dict[str, Any]:
    """Gradients accumulated over micro-batches of one sequence, layers recomputed: the same losses, nearly."""
    _, losses = _train(bench, "recomputed", "train.recompute=layer", "train.micro_batch_size=1")
    worst = _worst(bench, losses)
    if not worst <= TOLERANCE:
        raise StepFailedError(f"recomputation and accumulation change the losses by {worst:.3g}", {"losses": losses})
    return {"losses": losses, "relative_difference": worst}


def _worst(bench: Bench, losses: list[float]) -> float:
    first = [float(record["loss"]) for record in read_metrics(bench.folder / "runs" / "first")]
    if len(first) != TRAINING_STEPS or len(losses) != TRAINING_STEPS:
        raise StepFailedError("the run to compare with did not end", {"losses": losses})
    return max(abs(a - b) / abs(a) for a, b in zip(first, losses, strict=True))


STEPS: Mapping[str, tuple[Step, float]] = {
    "doctor": (lambda _: doctor.examine(), 60.0),
    "machine": (_machine, 60.0),
    "checks": (_checks, 180.0),
    "verify quick": (_verify, 240.0),
    "training": (_training, 180.0),
    "training, same seed": (_same_seed, 120.0),
    "training, recomputed": (_recomputed, 120.0),
    "bench comm": (_bench_comm, 120.0),
    "bench layer": (_bench_layer, _LAYER_S),
    "bench schemes": (_bench_schemes, 120.0),
    "bench planner": (_bench_planner, 60.0),
}
"""Name -> (what to do, seconds)."""
