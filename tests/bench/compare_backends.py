"""One file on two backends, by hand: per-step losses of `a` and `b`, and the tokens whose experts differ.

    python tests/bench/compare_backends.py quickstart --backends cpu,mindspore-cpu --nproc 4 train.steps=50

Two float32 backends add in different orders, so scores that nearly tie may choose another expert. `moved` is half the
sum over layers and experts of the difference of their loads: the fewest token copies that went elsewhere in that step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from twinmoe.moe_core.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--backends", default="cpu,mindspore-cpu")
    parser.add_argument("--nproc", default="4")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [_train(asked, name, Path(folder) / name) for name in asked.backends.split(",")]
    rows = [_row(a, b) for a, b in zip(*runs, strict=True)]
    seconds = [float(np.median([record["seconds"] for record in run[1:]])) for run in runs]
    report = {"config": asked.config, "backends": asked.backends, "rows": rows, "median_step_seconds": seconds}
    print(json.dumps(report) if asked.json else _table(report))


def _train(asked: argparse.Namespace, backend: str, folder: Path) -> list[dict[str, Any]]:
    words = ["train", asked.config, *asked.overrides, f"backend={backend}", "--nproc", asked.nproc, "--run-dir"]
    command = [sys.executable, "-m", "twinmoe.moe_core.cli", *words, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    if done.returncode:
        raise SystemExit(f"{backend}: {done.stderr}")
    return read_metrics(folder)


def _row(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    moved = np.abs(np.array(a["expert_load"]) - np.array(b["expert_load"])).sum() // 2
    copies = int(np.array(a["expert_load"]).sum())
    difference = abs(a["loss"] - b["loss"]) / abs(a["loss"])
    return {"step": a["step"], "loss": a["loss"], "difference": difference, "moved": int(moved), "copies": copies}


def _table(report: dict[str, Any]) -> str:
    rows = report["rows"]
    shown = [row for row in rows if row["step"] <= 5 or row["step"] % 10 == 0 or row["step"] == len(rows)]
    lines = [f"{r['step']:5} {r['loss']:9.5f} {r['difference']:9.1e} {r['moved']:6} of {r['copies']}" for r in shown]
    worst = {until: max(r["difference"] for r in rows[:until]) for until in (10, 20, 50) if until <= len(rows)}
    first, second = report["median_step_seconds"]
    ends = [f"worst relative difference to step {until}: {value:.1e}" for until, value in worst.items()]
    return "\n".join(
        [" step      loss difference  moved", *lines, *ends, f"seconds a step: {first:.3f} and {second:.3f}"]
    )


if __name__ == "__main__":
    main()
