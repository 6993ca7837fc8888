"""Does LocMoE work? Loss against share of rows that stay on their node, for routers, coefficients and assignments.

    python tests/bench/locmoe_experiment.py OUT.jsonl [--cores 12] [--minutes 7]    trains the cells that OUT lacks

One process stands for all ranks: nodes are virtual (runs of the global batch) and losses do not depend on the layout,
so ids, losses and rows between nodes are those of 2 nodes x 2 ranks. A cell is one training run; runs of one seed
share data and first values, so that differences are paired. `locmoe_report.py` makes the page.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Launch, TrainOptions
from twinmoe.backends.registry import load
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.data import GlobalBatch, open_data
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.model import Model, build_model
from twinmoe.moe_core.routing.arrangement import Arrangement
from twinmoe.moe_core.routing.locality import NODE_ROWS, local_share
from twinmoe.moe_core.train import learning_rate
from twinmoe.testing.bench.locmoe_cells import EXPERTS, NODES, STEPS, Cell, cells, config_of

HOME_EXPERTS, LAST = "home_experts", 100
"""Training steps at the end over which loads and shares are averaged."""


class Run:
    """One cell in training."""

    def __init__(self, cell: Cell) -> None:
        self.config, self.backend = config_of(cell), load("cpu")
        self.comm = self.backend.comm.connect(Launch())
        self.data = open_data(self.config.data, self.config.train)
        self.runtime = make_runtime(self.backend.ops, self.comm, Mesh.over(1))
        self.model: Model = build_model(self.config, self.runtime)
        self.state = self.backend.trainer.build(self.model.components, TrainOptions(), self.runtime.groups, self.comm)
        self.arrangement = Arrangement(cell.assignment, NODES, self.config.model.vocab_size)
        self.assigning = 0.0

    def step(self, step: int) -> list[dict[str, np.ndarray]]:
        """One optimizer step; the statistics of each layer."""
        trainer, batch = self.backend.trainer, self.data.batch(step)
        began = time.process_time()
        batch = self.arrangement.arrange(batch)
        self.assigning += time.process_time() - began
        _, out = trainer.accumulate(self.state, lambda: self.model.loss(self.state.modules, batch, step))
        trainer.clip_gradients(self.state, 1.0)
        trainer.step(self.state, learning_rate(self.config, step))
        statistics = [s.statistics for s in out.stats]
        began = time.process_time()
        self.arrangement.observe(self.backend.ops, statistics)
        self.arrangement.update(self.comm, self.runtime.groups["world"])
        self.assigning += time.process_time() - began
        told = [{n: self.backend.ops.to_numpy(v) for n, v in layer.items()} for layer in statistics]
        ids = [self.backend.ops.to_numpy(s.ids_TK) for s in out.stats]
        return [{**layer, HOME_EXPERTS: by_home(ids_TK)} for layer, ids_TK in zip(told, ids, strict=True)]

    def validate(self, batches: int) -> float:
        """Cross-entropy per token over the first validation batches."""
        total, weight = 0.0, 0
        for index in range(batches):
            batch = self.arrangement.arrange(self.data.validation_batch(index))
            total += self._loss(batch) * batch.total_targets
            weight += batch.total_targets
        return total / weight

    def _loss(self, batch: GlobalBatch) -> float:
        def forward() -> Any:
            return self.model.loss(self.state.modules, batch, self.config.train.steps, training=False)[1].cross_entropy

        return float(self.backend.ops.to_numpy(self.backend.trainer.evaluate(self.state, forward)))


def by_home(ids_TK: np.ndarray) -> np.ndarray:
    """(NODES, EXPERTS) rows of each home node's tokens at each expert; a global batch lies in runs of the nodes."""
    return np.stack([np.bincount(part[part >= 0], minlength=EXPERTS) for part in np.split(ids_TK, NODES)])


def swapped_share(rows_NE: np.ndarray) -> float:
    """Local share if this layer's experts changed places between the two nodes as well as they can."""
    gain_E = np.sort(rows_NE[0] - rows_NE[1])
    half = EXPERTS // NODES
    return float((rows_NE.sum() + gain_E[half:].sum() - gain_E[:half].sum()) / (2 * rows_NE.sum()))


def train(cell: Cell) -> dict[str, Any]:
    """The figures of one cell."""
    run = Run(cell)
    began = time.process_time()
    seen: list[list[dict[str, np.ndarray]]] = []
    curve: list[tuple[int, float]] = []
    for step in range(cell.steps):
        seen = [*seen[1 - LAST :], run.step(step)]
        if step % 500 == 499:
            curve.append((step + 1, run.validate(16)))
    layers = [{n: np.sum([s[i][n] for s in seen], 0) for n in seen[0][i]} for i in range(len(seen[0]))]
    chosen = np.array([layer["chosen_E"] for layer in layers], np.float64)
    kept = np.array([layer["kept_E"].sum() for layer in layers], np.float64)
    crossing = sum(layer[NODE_ROWS].sum() - np.trace(layer[NODE_ROWS].reshape(NODES, NODES)) for layer in layers)
    return {
        **asdict(cell),
        "setting": cell.setting,
        "validation_loss": run.validate(64),
        "local_share": [local_share(layer) for layer in layers],
        "swapped_share": [swapped_share(layer[HOME_EXPERTS]) for layer in layers],
        "curve": curve,
        "load_max_over_mean": float((chosen.max(1) / chosen.mean(1)).mean()),
        "rows_crossing_per_token": float(crossing / (LAST * len(layers) * 16 * 64)),
        "drop_rate": float(1 - kept.sum() / chosen.sum()),
        "assignment_share": run.assigning / (time.process_time() - began),
        "cpu_seconds": time.process_time() - began,
    }


def run_cells(out: Path, todo: Iterable[Cell], cores: int, minutes: float) -> None:
    """Train cells, one per core, until the time is up; a JSON line in OUT as each ends."""
    deadline = time.monotonic() + 60 * minutes
    with out.open("a", encoding="utf-8") as file, ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        waiting = iter(todo)
        running = {pool.submit(train, cell) for cell in islice(waiting, cores)}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                if error := future.exception():
                    print(f"{type(error).__name__}: {error}", flush=True)
                    continue
                file.write(json.dumps(future.result()) + "\n")
                file.flush()
            for _ in ended:
                if time.monotonic() < deadline:
                    running |= {pool.submit(train, cell) for cell in islice(waiting, 1)}


def read(out: Path) -> list[dict[str, Any]]:
    """Results of a file of JSON lines; none where it is missing."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=1e9, help="no run starts later")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of every run; those that train longer keep their factor"
    )
    parser.add_argument("--without", type=Path, help="a file of names that are done, one a line")
    options = parser.parse_args()
    done = {f"{result['setting']} seed{result['seed']}" for result in read(options.out)}
    done |= set(options.without.read_text(encoding="utf-8").splitlines()) if options.without else set()
    todo = [replace(cell, steps=cell.steps * options.steps // STEPS) for cell in cells()]
    run_cells(options.out, [cell for cell in todo if cell.name not in done], options.cores, options.minutes)


if __name__ == "__main__":
    main()
