"""Does LocMoE work? Loss against share of rows that stay on their node, for routers, coefficients and assignments.

    python tests/bench/locmoe_experiment.py run OUT [--minutes 60]     trains the cells that OUT lacks, best first
    python tests/bench/locmoe_experiment.py report OUT docs/locmoe.md  table, and the front as docs/locmoe_front.svg

One process stands for all ranks: nodes are virtual (runs of the global batch) and losses do not depend on the layout,
so ids, losses and rows between nodes are those of 2 nodes x 2 ranks. A cell is one training run; runs of one seed
share data and first values, so that differences are paired.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Launch, TrainOptions
from twinmoe.backends.registry import load
from twinmoe.moe_core.bench_router import Case
from twinmoe.moe_core.bench_router import run as bench_router
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.data import GlobalBatch, open_data
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.model import Model, build_model
from twinmoe.moe_core.routing.arrangement import Arrangement
from twinmoe.moe_core.routing.locality import NODE_ROWS, local_share
from twinmoe.moe_core.train import learning_rate

NODES, EXPERTS, LAST = 2, 8, 100
"""Virtual nodes, experts, and the training steps at the end over which loads and shares are averaged."""


@dataclass(frozen=True)
class Cell:
    """One training run. mu: locality coefficient; ramp: share of the steps before it sets in (0: from the start)."""

    router: str = "switch"
    top_k: int = 1
    mu: float = 0.0
    assignment: str = "by_domain"
    ramp: float = 0.0
    gradient: str = "model"
    scope: str = "node"
    seed: int = 0
    steps: int = 800
    more: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def setting(self) -> str:
        """What distinguishes it, without the seed."""
        parts = [self.router, f"top{self.top_k}", *(f"{name}={value}" for name, value in self.more)]
        parts += [f"mu{self.mu:g}", self.assignment]
        parts += [f"ramp{self.ramp:g}"] if self.ramp else []
        parts += ["router-only"] if self.gradient == "router" else []
        parts += ["per-sequence"] if self.scope == "sequence" else []
        return " ".join([*parts, f"{self.steps}steps"])

    @property
    def file(self) -> str:
        return self.setting.replace(" ", "_").replace("=", "-") + f"_seed{self.seed}.json"


GRAP = (("score_scale", "sqrt"),)
GROUPS = (("num_groups", NODES), ("inner_router", "topk"))
RANDOM = (("num_groups", NODES), ("inner_router", "random"))


def cells() -> Iterator[Cell]:
    """The most telling first: a run that is cut short still says something."""
    for seeds in ((0,), (1, 2), (3, 4)):
        for seed in seeds:
            yield from main_cells(seed)
        if seeds[0] < 3:
            for seed in seeds[:1]:
                yield from other_cells(seed)
    for seed in range(2):
        yield Cell(seed=seed, steps=2400)
        yield Cell(mu=0.1, ramp=0.3, seed=seed, steps=2400)
    for seed in range(5):
        yield Cell("hash", seed=seed)
        yield Cell("hierarchical", seed=seed, more=RANDOM)
    for seed in range(3):
        yield Cell("hierarchical", seed=seed, more=(("num_groups", NODES), ("inner_router", "grap"), *GRAP))
    for seed in range(2):
        yield Cell("hierarchical", 2, seed=seed, more=GROUPS)
        yield Cell("grap", mu=0.3, ramp=0.3, seed=seed, more=GRAP)


def main_cells(seed: int) -> Iterator[Cell]:
    """Switch, LocMoE's gate and PanGu-Sigma's domain level, with locality by domain and by affinity."""
    yield Cell(seed=seed)
    yield Cell(mu=0.1, ramp=0.3, seed=seed)
    yield Cell(mu=0.1, assignment="by_affinity", ramp=0.3, seed=seed)
    yield Cell("grap", mu=0.1, ramp=0.3, seed=seed, more=GRAP)
    yield Cell("hierarchical", seed=seed, more=GROUPS)


def other_cells(seed: int) -> Iterator[Cell]:
    """Other routers and coefficients, the control, no ramp, gradient to the router only, each sequence for itself."""
    yield Cell(mu=0.3, ramp=0.3, seed=seed)
    yield Cell(mu=0.03, ramp=0.3, seed=seed)
    yield Cell("topk", 2, seed=seed)
    yield Cell("topk", 2, mu=0.1, ramp=0.3, seed=seed)
    yield Cell(mu=0.1, assignment="round_robin", ramp=0.3, seed=seed)
    yield Cell("hash", seed=seed)
    yield Cell(mu=0.3, ramp=0.3, gradient="router", seed=seed)
    yield Cell(mu=0.1, seed=seed)
    yield Cell("hierarchical", seed=seed, more=RANDOM)
    yield Cell("expert_token_resonance", mu=0.1, ramp=0.3, seed=seed, more=(*GRAP, ("capacity_factor", "1.25")))
    yield Cell("grap", seed=seed, more=GRAP)
    yield Cell(mu=0.1, ramp=0.3, scope="sequence", seed=seed)
    yield Cell(mu=0.2, ramp=0.3, seed=seed)


def config_of(cell: Cell) -> Config:
    """A quarter of the quick-start: three blocks of width 64, sequences of 64 bytes."""
    start = round(cell.ramp * cell.steps)
    moe = {
        "num_experts": EXPERTS, "top_k": cell.top_k, "expert_hidden_size": 128, "router": cell.router,
        "aux_loss_coeff": 0.01, "z_loss_coeff": 0.001, "locality_nodes": NODES, "locality_loss_coeff": cell.mu,
        "locality_gradient": cell.gradient, "locality_scope": cell.scope, "locality_start_step": start,
        "locality_ramp_steps": start // 3, **dict(cell.more),
    }  # fmt: skip
    model = {
        "vocab_size": 257, "hidden_size": 64, "num_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_embeddings": True,
    }  # fmt: skip
    train = {
        "steps": cell.steps, "seed": cell.seed, "global_batch_size": 16, "sequence_length": 64, "learning_rate": 3e-3,
        "min_learning_rate": 3e-4, "warmup_steps": 40,
    }  # fmt: skip
    return Config.model_validate({"model": model, "moe": moe, "train": train})


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

    def step(self, step: int) -> list[dict[str, np.ndarray]]:
        """One optimizer step; the statistics of each layer."""
        trainer, batch = self.backend.trainer, self.arrangement.arrange(self.data.batch(step))
        _, out = trainer.accumulate(self.state, lambda: self.model.loss(self.state.modules, batch, step))
        trainer.clip_gradients(self.state, 1.0)
        trainer.step(self.state, learning_rate(self.config, step))
        statistics = [s.statistics for s in out.stats]
        self.arrangement.observe(self.backend.ops, statistics)
        self.arrangement.update(self.comm, self.runtime.groups["world"])
        return [{n: self.backend.ops.to_numpy(v) for n, v in layer.items()} for layer in statistics]

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


def train(cell: Cell) -> dict[str, Any]:
    """The figures of one cell."""
    began, run = time.process_time(), Run(cell)
    seen = [run.step(step) for step in range(cell.steps)][-LAST:]
    layers = [{n: np.sum([s[i][n] for s in seen], 0) for n in seen[0][i]} for i in range(len(seen[0]))]
    chosen = np.array([layer["chosen_E"] for layer in layers], np.float64)
    kept = np.array([layer["kept_E"].sum() for layer in layers], np.float64)
    crossing = sum(layer[NODE_ROWS].sum() - np.trace(layer[NODE_ROWS].reshape(NODES, NODES)) for layer in layers)
    return {
        **asdict(cell),
        "setting": cell.setting,
        "validation_loss": run.validate(64),
        "local_share": [local_share(layer) for layer in layers],
        "load_max_over_mean": float((chosen.max(1) / chosen.mean(1)).mean()),
        "rows_crossing_per_token": float(crossing / (LAST * len(layers) * 16 * 64)),
        "drop_rate": float(1 - kept.sum() / chosen.sum()),
        "cpu_seconds": time.process_time() - began,
    }


def run_cells(out: Path, minutes: float) -> None:
    """Train what is missing until the time is up."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    for cell in cells():
        file = out / cell.file
        if file.exists():
            continue
        if time.monotonic() > deadline:
            return
        result = train(cell)
        file.with_suffix(".part").write_text(json.dumps(result, indent=1))
        file.with_suffix(".part").rename(file)
        share = statistics.mean(result["local_share"])
        print(f"{result['validation_loss']:.4f} local {share:.3f} {cell.file}", flush=True)


# --- report ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """A setting over its seeds. Differences in percent of validation loss, same seed: against switch without locality,
    and against the same router without locality (where that was run)."""

    setting: str
    results: Sequence[dict[str, Any]]
    differences: Sequence[float]
    own_differences: Sequence[float]

    def mean(self, key: str) -> float:
        return statistics.mean(r[key] for r in self.results)

    @property
    def local(self) -> float:
        return statistics.mean(statistics.mean(r["local_share"]) for r in self.results)

    @property
    def difference(self) -> float:
        return statistics.mean(self.differences)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.differences) if len(self.differences) > 1 else math.nan


def lines(out: Path) -> list[Line]:
    """Settings with at least one seed whose baseline is there, best local share first."""
    results = [json.loads(f.read_text()) for f in sorted(out.glob("*.json"))]
    losses = {_gate(r): r["validation_loss"] for r in results if r["mu"] == 0.0}
    grouped: dict[str, list[dict[str, Any]]] = {}
    for r in results:
        if _switch(r) in losses:
            grouped.setdefault(r["setting"], []).append(r)
    made = []
    for setting, members in grouped.items():
        own = [_percent(r, losses[_gate(r)]) for r in members if r["mu"] and _gate(r) in losses]
        made.append(Line(setting, members, [_percent(r, losses[_switch(r)]) for r in members], own))
    return sorted(made, key=lambda line: -line.local)


def _gate(result: dict[str, Any]) -> tuple[Any, ...]:
    """What a run shares with the run of the same router without locality."""
    return result["router"], result["top_k"], str(result["more"]), result["seed"], result["steps"]


def _switch(result: dict[str, Any]) -> tuple[Any, ...]:
    return "switch", 1, "[]", result["seed"], result["steps"]


def _percent(result: dict[str, Any], base: float) -> float:
    return 100 * (result["validation_loss"] / base - 1)


def front(found: Sequence[Line]) -> list[Line]:
    """Lines that no other beats in both local share and loss."""
    return [
        a for a in found if not any(b is not a and b.local >= a.local and b.difference <= a.difference for b in found)
    ]


def table(found: Sequence[Line]) -> list[str]:
    """Markdown rows; those on the front are bold."""
    best, rows = front(found), []
    for line in found:
        layers = " ".join(f"{np.mean([r['local_share'][i] for r in line.results]):.2f}" for i in range(3))
        spread = "-" if math.isnan(line.spread) else f"{line.spread:.2f}"
        own = f"{statistics.mean(line.own_differences):+.2f}" if line.own_differences else "-"
        name = f"**{line.setting}**" if line in best else line.setting
        rows.append(
            f"| {name} | {len(line.results)} | {line.mean('validation_loss'):.4f} | {line.difference:+.2f} | "
            f"{spread} | {own} | {line.local:.3f} | {layers} | {line.mean('rows_crossing_per_token'):.3f} | "
            f"{line.mean('load_max_over_mean'):.2f} | {100 * line.mean('drop_rate'):.1f} |"
        )
    return rows


def picture(found: Sequence[Line]) -> str:
    """Scatter of loss difference (up) over local share (right) as SVG; the front in colour."""
    width, height, margin = 640, 400, 50
    top = max(line.difference for line in found) + 0.5
    low = min(line.difference for line in found) - 0.5

    def place(line: Line) -> tuple[float, float]:
        x = margin + (line.local - 0.4) / 0.6 * (width - 2 * margin)
        return x, margin + (top - line.difference) / (top - low) * (height - 2 * margin)

    best, parts = front(found), [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">']
    parts.append('<style>text{font:10px sans-serif}</style><rect width="100%" height="100%" fill="white"/>')
    for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        x = margin + (share - 0.4) / 0.6 * (width - 2 * margin)
        parts.append(f'<path d="M{x} {margin}V{height - margin}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8}" y="{height - margin + 15}">{share:.0%}</text>')
    for difference in range(math.ceil(low), math.floor(top) + 1):
        y = margin + (top - difference) / (top - low) * (height - 2 * margin)
        parts.append(f'<path d="M{margin} {y}H{width - margin}" stroke="{"#888" if difference == 0 else "#ddd"}"/>')
        parts.append(f'<text x="{margin - 28}" y="{y + 3}">{difference:+d} %</text>')
    for line in found:
        x, y = place(line)
        colour = "#c00" if line in best else "#777"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{line.setting}</title></circle>')
        if line in best:
            parts.append(
                f'<text x="{x + 6:.1f}" y="{y - 5:.1f}" fill="{colour}">{line.setting.rsplit(" ", 1)[0]}</text>'
            )
    parts.append(f'<text x="{width / 2 - 110}" y="{height - 12}">share of rows that stay on their node</text>')
    parts.append('<text x="10" y="20">validation loss against switch without locality, same seeds</text></svg>')
    return "\n".join(parts) + "\n"


def router_times() -> list[str]:
    """Milliseconds of each router on the experiment's shape."""
    shape = [
        Case("switch", EXPERTS), Case("topk", EXPERTS), Case("grap", EXPERTS, dict(GRAP)), Case("hash", EXPERTS),
        Case("hierarchical", EXPERTS, {"num_groups": 2}),
        Case("expert_token_resonance", EXPERTS, {"capacity_factor": "1.25"}),
    ]  # fmt: skip
    rows = bench_router(load("cpu"), shape, tokens=1024, hidden_size=64, repeats=21)["rows"]
    return [f"| {r['router']} | {r['milliseconds']:.2f} | {r['baseline_milliseconds']:.2f} |" for r in rows]


HEAD = (
    "| setting | seeds | validation loss | difference, % | spread | own, % | local | by layer | rows crossing "
    "| max/mean | dropped, % |"
)


def report(out: Path, page: Path) -> None:
    """Replace what stands between the marks of the page, and draw the front beside it."""
    begin, end = "<!-- measured -->", "<!-- end -->"
    found = lines(out)
    measured = [HEAD, "|" + "---|" * 11, *table(found), ""]
    measured += ["| router | ms | plain softmax and top-k, ms |", "|---|---|---|", *router_times()]
    text = page.read_text(encoding="utf-8")
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(before + begin + "\n\n" + "\n".join(measured) + "\n\n" + end + after, encoding="utf-8")
    page.with_name(page.stem + "_front.svg").write_text(picture(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("out", type=Path)
    parser.add_argument("page", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=1e9)
    options = parser.parse_args()
    if options.what == "run":
        run_cells(options.out, options.minutes)
    else:
        report(options.out, options.page)


if __name__ == "__main__":
    main()
