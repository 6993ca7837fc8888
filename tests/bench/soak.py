"""A long run that moves experts and saves: is its memory flat, and does it leave anything behind? Run by hand:

python tests/bench/soak.py [--steps 2000] [--nproc 4] [--set key=value ...] [--json]

The quick-start at a reduced size; experts may change places every 50 steps, a checkpoint every 100. Every second the
resident memory, open files, sockets and threads of every process of the job are noted. Memory of a process is flat if
its median over the last tenth of the steps is within 2 % of that from the fourth tenth. Exit status 1 if it is not, if
open files or threads grow, or if a process, port, temporary file or stray file of the run is left.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

from twinmoe.moe_core.checkpoint import Checkpoint, steps_in
from twinmoe.moe_core.metrics import read_metrics

CONFIG = (
    *("model.hidden_size=32", "model.num_layers=2", "model.num_attention_heads=2", "moe.expert_hidden_size=32"),
    *("train.sequence_length=32", "train.global_batch_size=8", "train.validate_every=0", "train.validation_batches=1"),
    *("train.save_every=100", "train.keep_last=99", "parallel.placement=swap", "parallel.swap.every=50"),
    *("parallel.swap.objective=load", "parallel.swap.min_gain=0"),
)
EARLY, LATE, FLAT = (0.3, 0.4), (0.9, 1.0), 0.02
Words = list[str]


@dataclass(frozen=True)
class Sample:
    """One process at one moment."""

    step: int
    process: str
    resident: int
    files: int
    threads: int


def processes(root: int) -> dict[int, str]:
    """Process ids below root (and root) and what they are."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, ValueError):
                continue
    found, level = {root: "supervisor"}, {root}
    for depth in ("launcher", "worker"):
        level = {child for child, parent in parents.items() if parent in level}
        found.update({child: f"{depth}" for child in level})
    return found


def sample(root: int, step: int) -> Iterator[Sample]:
    numbers: dict[str, int] = {}
    for pid, kind in sorted(processes(root).items()):
        place = Path("/proc") / str(pid)
        try:
            resident = int((place / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files, threads = len(list((place / "fd").iterdir())), len(list((place / "task").iterdir()))
        except OSError:
            continue
        number = numbers[kind] = numbers.get(kind, -1) + 1
        yield Sample(step, f"{kind} {number}" if kind == "worker" else kind, resident, files, threads)


def steps_made(run_dir: Path) -> int:
    """Of the last whole line of the metrics."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20000))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if len(lines) > 1 else 0


def watch(command: Words, folder: Path) -> tuple[list[Sample], set[int]]:
    """Run to the end; what was seen on the way, and the ids of all processes seen."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    seen, pids = [], set()
    with (folder / "told.txt").open("w") as told:
        child = subprocess.Popen(command, cwd=folder, stdout=told, stderr=told, env=environment)
        while child.poll() is None:
            seen += sample(child.pid, steps_made(folder / "run"))
            pids |= set(processes(child.pid))
            time.sleep(1)
    assert child.returncode == 0, (folder / "told.txt").read_text()[-3000:]
    return seen, pids


def median_of(samples: list[Sample], process: str, steps: int, part: tuple[float, float], what: str) -> float:
    values = [
        getattr(s, what) for s in samples if s.process == process and part[0] * steps <= s.step <= part[1] * steps
    ]
    return statistics.median(values) if values else float("nan")


def growth(samples: list[Sample], steps: int) -> dict[str, dict[str, float]]:
    """By process: MiB early, and late over early; open files and threads that came to it."""
    found = {}
    for process in sorted({s.process for s in samples if s.step > LATE[0] * steps}):
        early, late = ({w: median_of(samples, process, steps, p, w) for w in WHAT} for p in (EARLY, LATE))
        found[process] = {
            "mebibytes": round(early["resident"] / 2**20, 1),
            "memory_late_over_early": round(late["resident"] / early["resident"], 4),
            "more_files": late["files"] - early["files"],
            "more_threads": late["threads"] - early["threads"],
        }
    return found


WHAT = ("resident", "files", "threads")


def leftovers(folder: Path, pids: set[int], port: int) -> list[str]:
    """What should be gone."""
    alive = [f"process {pid}" for pid in sorted(pids) if (Path("/proc") / str(pid)).exists()]
    files = [str(path.relative_to(folder)) for path in (folder / "tmp").rglob("*") if path.is_file()]
    run = folder / "run"
    strays = [*run.rglob("*.tmp"), *run.rglob("*.old"), *run.rglob("*.new"), *run.rglob("*.stalled.json")]
    with socket.socket() as probe:
        held = probe.connect_ex(("127.0.0.1", port)) == 0
    return [*alive, *files, *map(str, strays), *([f"port {port}"] if held else [])]


def moved(run_dir: Path) -> tuple[int, int]:
    """(checkpoints, of which the placement differs from that of the one before)."""
    placements = [Checkpoint(path).manifest["placements"] for path in steps_in(run_dir / "checkpoints")]
    return len(placements), sum(a != b for a, b in pairwise(placements))


def soak(steps: int, nproc: int, extra: Words) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = [
            "train",
            "quickstart",
            f"train.steps={steps}",
            *CONFIG,
            *extra,
            "--run-dir",
            "run",
            "--port",
            str(port),
        ]
        start = time.monotonic()
        job = [*words, "--nproc", str(nproc), "--port", str(port)]
        samples, pids = watch([sys.executable, "-m", "twinmoe.moe_core.cli", *job], folder)
        seconds = time.monotonic() - start
        time.sleep(1)
        checkpoints, changes = moved(folder / "run")
        records = read_metrics(folder / "run")
        return {
            "date": str(date.today()),
            "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
            "steps": len(records),
            "ranks": nproc,
            "seconds": round(seconds, 1),
            "checkpoints": checkpoints,
            "checkpoints_with_another_placement": changes,
            "loss_first_last": [records[0]["loss"], records[-1]["loss"]],
            "processes": growth(samples, steps),
            "left_behind": leftovers(folder, pids, port),
        }


def good(found: dict[str, Any]) -> bool:
    rows = found["processes"].values()
    flat = all(abs(row["memory_late_over_early"] - 1) <= FLAT for row in rows)
    return (
        flat and not any(row["more_files"] > 0 or row["more_threads"] > 0 for row in rows) and not found["left_behind"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="more words for `twinmoe train`")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    found = soak(words.steps, words.nproc, words.set)
    if words.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            if key != "processes":
                print(f"{key}: {value}")
        for process, row in found["processes"].items():
            print(f"{process}: " + ", ".join(f"{name} {value:g}" for name, value in row.items()))
    sys.exit(0 if good(found) else 1)


if __name__ == "__main__":
    main()
