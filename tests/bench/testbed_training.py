"""Train the same experiment in several ways on the nodes of a testbed, and compare step times. Run by hand, as root:

    python tests/bench/testbed_training.py 2x2 100mbit locmoe switch hash --steps 60 -- train.seed=1

A cell is a packaged experiment, or NAME:key=value,key=value. Words after -- go to every cell. One table and, with
--out, one JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from twinmoe.backends.registry import worker_environment
from twinmoe.moe_core.bench_job import report_of
from twinmoe.moe_core.combinations import check_ranks
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.launch import WORKER
from twinmoe.moe_core.metrics import METRICS
from twinmoe.moe_core.run_folder import LOGS, open_run_folder
from twinmoe.moe_core.testbed import Shape, Testbed, run_ranks
from twinmoe.moe_core.worker import Order

WARM = 5
"""Steps that do not count: first calls, connections, swaps that settle."""
LAST = 100
"""Steps at the end that figures are taken from: losses that set in late have done their work."""


def run_cell(cell: str, words: list[str], shape: Shape, folder: Path, timeout_s: float) -> dict[str, Any]:
    name, _, settings = cell.partition(":")
    overrides = [w for w in settings.split(",") if w] + words
    config = load_config(name, [*overrides, "train.validate_every=0"])
    check_ranks(config, shape.ranks)
    open_run_folder(folder, config, resume=False)
    order = Order("train", folder, "cpu", "testbed", {})
    with Testbed(shape) as testbed:
        environment = worker_environment(str(Path(sys.executable).parent))
        command = [sys.executable, "-m", WORKER, *order.words()]
        statuses = run_ranks(testbed, command, environment, 29660, folder / LOGS / "launcher.log", timeout_s)
    summary = report_of(folder, statuses)
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line][WARM:]
    late = steps[-LAST:]
    return {
        "cell": cell,
        "step_milliseconds": round(1e3 * median(s["seconds"] for s in late), 1),
        "forward_backward_milliseconds": round(1e3 * median(s["phases"]["forward_backward"] for s in late), 1),
        "bytes_sent": steps[-1]["bytes"],
        "rows_crossing_per_token": round(_mean(late, "bytes_between_nodes") / _row_bytes(config, late), 4),
        "rank_imbalance": round(_mean(late, "rank_imbalance"), 3),
        "loss_last": summary["loss_last"],
        "validation_loss": summary["validation_loss"],
        "model_hash": summary["model_hash"],
        "steps": summary["steps"],
    }


def _mean(steps: list[dict[str, Any]], key: str) -> float:
    return sum(s[key] for s in steps) / len(steps)


def _row_bytes(config: Config, steps: list[dict[str, Any]]) -> float:
    """Bytes of one row, there and back, in every layer, for each token of a step."""
    layers = config.model.num_layers - config.model.num_dense_layers
    return 2 * 4 * config.model.hidden_size * layers * _mean(steps, "tokens")


def main() -> None:
    words = sys.argv[1:]
    common = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape")
    parser.add_argument("rate")
    parser.add_argument("cells", nargs="+")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words[: len(words) - len(common) - bool(common)])
    shape = Shape.parse(args.shape, args.rate)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, cell in enumerate(args.cells):
            extra = [f"train.steps={args.steps}", *common]
            rows.append(run_cell(cell, extra, shape, Path(name) / str(number), args.timeout))
            print(json.dumps(rows[-1]), flush=True)
    first = rows[0]
    for row in rows:
        mark = "" if row["model_hash"] == first["model_hash"] else " (another model)"
        ratio = first["step_milliseconds"] / row["step_milliseconds"]
        print(
            f"{row['cell'] + mark}: {row['step_milliseconds']} ms a step, {ratio:.2f} x, {row['validation_loss']:.4f}"
        )
    if args.out:
        args.out.write_text(json.dumps({"shape": args.shape, "rate": args.rate, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
