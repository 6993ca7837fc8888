"""Train the same experiment in several ways, then compare their steps on the nodes of a testbed. Run by hand, as root:

    python tests/bench/testbed_training.py 2x2 100mbit locmoe quickstart:moe.router=hash --settle 300 -- train.seed=1

A cell is a packaged experiment, or NAME:key=value,key=value. Words after -- go to every cell. With --settle N a cell
first trains N steps between nodes whose links are not shaped (losses do not depend on links; the validation loss is
from there), and goes on with --steps timed ones. Cells take turns, --rounds times. --keep DIR keeps what was trained: a
second call times it again. One table and, with --out, one JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
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
from twinmoe.moe_core.run_folder import LOGS, SUMMARY, open_run_folder
from twinmoe.moe_core.testbed import Shape, Testbed, run_ranks
from twinmoe.moe_core.worker import Order

WARM = 5
"""Steps that do not count: first calls, connections, swaps that settle."""


@dataclass(frozen=True)
class Cell:
    """One way to train. folder: where its run lies."""

    text: str
    words: tuple[str, ...]
    folder: Path

    def config(self, steps: int) -> Config:
        name, _, settings = self.text.partition(":")
        own = [word for word in settings.split(",") if word]
        fixed = [f"train.steps={steps}", f"train.save_every={steps}", "train.validate_every=0"]
        return load_config(name, [*own, *self.words, *fixed])


def train(config: Config, folder: Path, shape: Shape, resume: Path | None, timeout_s: float) -> dict[str, Any]:
    """One run on the testbed; its summary."""
    check_ranks(config, shape.ranks)
    open_run_folder(folder, config, resume=False)
    order = Order("train", folder, "cpu", "testbed", {"resume": None if resume is None else str(resume)})
    with Testbed(shape) as testbed:
        environment = worker_environment(str(Path(sys.executable).parent))
        command = [sys.executable, "-m", WORKER, *order.words()]
        statuses = run_ranks(testbed, command, environment, 29660, folder / LOGS / "launcher.log", timeout_s)
    return report_of(folder, statuses)


def settle(cell: Cell, steps: int, shape: Shape, timeout_s: float) -> dict[str, Any]:
    """The summary of the cell's training, which is done where it was not yet."""
    summary = cell.folder / SUMMARY
    if summary.exists():
        return json.loads(summary.read_text())
    unshaped = Shape(shape.nodes, shape.ranks_per_node)
    return train(cell.config(steps), cell.folder, unshaped, None, timeout_s)


def timed(
    cell: Cell, settled: int, steps: int, shape: Shape, timeout_s: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Records of steps between shaped nodes, and the run's summary."""
    with tempfile.TemporaryDirectory() as name:
        folder, resume = Path(name) / "run", cell.folder if settled else None
        summary = train(cell.config(settled + WARM + steps), folder, shape, resume, timeout_s)
        lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [line for line in lines if line["step"] > settled + WARM], summary


def figures(cell: Cell, records: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    config = cell.config(1)
    layers = config.model.num_layers - config.model.num_dense_layers
    there_and_back = 2 * 4 * config.model.hidden_size * layers

    def mean(key: str) -> float:
        return sum(r[key] for r in records) / len(records)

    return {
        "cell": cell.text,
        "step_milliseconds": round(1e3 * median(r["seconds"] for r in records), 1),
        "quartiles": [round(1e3 * q, 1) for q in _quartiles([r["seconds"] for r in records])],
        "forward_backward_milliseconds": round(1e3 * median(r["phases"]["forward_backward"] for r in records), 1),
        "rows_crossing_per_token": round(mean("bytes_between_nodes") / (there_and_back * mean("tokens")), 4),
        "rank_imbalance": round(mean("rank_imbalance"), 3),
        "bytes_sent": records[-1]["bytes"],
        "validation_loss": round(summary["validation_loss"], 4),
        "model_hash": summary["model_hash"],
        "timed_steps": len(records),
    }


def _quartiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


def parsed() -> tuple[argparse.Namespace, list[str]]:
    words = sys.argv[1:]
    common = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape")
    parser.add_argument("rate")
    parser.add_argument("cells", nargs="+")
    parser.add_argument("--settle", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words[: len(words) - len(common) - bool(common)]), common


def main() -> None:
    args, common = parsed()
    shape = Shape.parse(args.shape, args.rate)
    with tempfile.TemporaryDirectory() as name:
        kept = args.keep or Path(name)
        folders = [kept / "".join(c if c.isalnum() else "_" for c in text) for text in args.cells]
        cells = [Cell(text, tuple(common), folder) for text, folder in zip(args.cells, folders, strict=True)]
        summaries = [settle(cell, args.settle, shape, args.timeout) if args.settle else {} for cell in cells]
        records: list[list[dict[str, Any]]] = [[] for _ in cells]
        for _ in range(args.rounds):
            for number, cell in enumerate(cells):
                seen, summary = timed(cell, args.settle, args.steps, shape, args.timeout)
                records[number] += seen
                summaries[number] = summaries[number] or summary
    if not args.rounds:
        return
    rows = [figures(*row) for row in zip(cells, records, summaries, strict=True)]
    for row in rows:
        mark = "" if row["model_hash"] == rows[0]["model_hash"] else " (another model)"
        ratio = rows[0]["step_milliseconds"] / row["step_milliseconds"]
        print(f"{row['cell'] + mark}: {row['step_milliseconds']} ms a step, {ratio:.2f} x, {row['validation_loss']}")
    text = json.dumps({"shape": args.shape, "rate": args.rate, "rows": rows}, indent=1)
    print(text) if args.out is None else args.out.write_text(text)


if __name__ == "__main__":
    main()
