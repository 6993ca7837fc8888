"""The simulator beside `bench schemes`: step times, order of schemes, and whether the best by model is the best.

    python tests/bench/simulator_accuracy.py --comm comm.json --layer layer_*.json --experts 16 --tokens 256 [--shared]
        --cells 512,64=cells_a.json 512,64=cells_b.json ...

Lines come from `bench comm --fit --json`, rates from `bench layer --optimizer --json` (as many at once as ranks), cells
from `bench schemes --json` of WIDTH,EXPERT_WIDTH. No time of a scheme enters a fit.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from twinmoe.moe_core.bench_job import Where
from twinmoe.moe_core.bench_schemes_request import SchemesRequest, scheme_config
from twinmoe.moe_core.config import ClusterConfig, Config
from twinmoe.moe_core.simulate import Choices, Task, simulate
from twinmoe.moe_core.simulate_rates import Rates, rates_of_bench, shape_of
from twinmoe.moe_core.synthetic import Skew, choose

TIE = 0.03
"""Measured times closer than this have no order."""


def predicted(
    row: dict[str, Any], request: SchemesRequest, cluster: ClusterConfig, reports: list[Any], ranks: int
) -> dict[str, float]:
    """Seconds of one cell by part: the layer's, the reduction of its router, the optimizer."""
    config = scheme_config(row["scheme"], request)
    moe = config.moe.model_copy(update={"top_k": row["top_k"]})
    model = config.model.model_copy(update={"num_layers": 1})
    config = config.model_copy(update={"cluster": cluster, "moe": moe, "model": model})
    skew = Skew.parse(row["skew"])
    ids = [choose(skew, request.num_experts, request.tokens, row["top_k"], 1000 * r) for r in range(ranks)]
    counts = np.stack([np.bincount(i.reshape(-1), minlength=request.num_experts) for i in ids])
    source = np.repeat(np.arange(ranks), request.tokens)
    choices = Choices(counts, np.concatenate(ids), source)
    rates = rates_of_bench(reports, shape_of(config, 4))
    (cost,) = simulate({"cell": config}, ranks, Task(lambda _: [[choices]], whole=False), rates)
    return cost.seconds | rest(config, rates, cluster, ranks)


def rest(config: Config, rates: Rates, cluster: ClusterConfig, ranks: int) -> dict[str, float]:
    outermost = cluster.levels[-1]
    expert = 3 * config.model.hidden_size * config.moe.expert_hidden_size
    stored = config.moe.num_experts * expert / ranks + config.model.hidden_size * config.moe.top_k
    router = 4 * config.model.hidden_size * config.moe.top_k
    return {"reduce": 2 * (outermost.alpha + router * outermost.beta), "optimizer": stored * rates.per_parameter}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--comm", type=Path, required=True)
    parser.add_argument("--layer", type=Path, nargs="+", required=True)
    parser.add_argument("--cells", nargs="+", required=True)
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--shared", action="store_true", help="ranks of a node share its link")
    parser.add_argument("--parts", action="store_true")
    told = parser.parse_args()
    comm = json.loads(told.comm.read_text())
    cluster = ClusterConfig.model_validate(comm["cluster"])
    if told.shared:
        levels = (*cluster.levels[:-1], cluster.levels[-1].model_copy(update={"shared_link": True}))
        cluster = cluster.model_copy(update={"levels": levels})
    reports = [json.loads(path.read_text()) for path in told.layer]
    cells: dict[Any, list[tuple[str, float, float]]] = {}
    for entry in told.cells:
        sizes, _, name = entry.partition("=")
        width, inner = map(int, sizes.split(","))
        report = json.loads(Path(name).read_text())
        ks = tuple(sorted({row["top_k"] for row in report["rows"]}))
        request = SchemesRequest(Where(), (), (), ks, told.experts, width, inner, told.tokens)
        for row in report["rows"]:
            parts = predicted(row, request, cluster, reports, report["ranks"])
            seconds, measured = sum(parts.values()), 1e-3 * row["step_milliseconds"]
            cells.setdefault((sizes, row["top_k"], row["skew"]), []).append((row["scheme"], measured, seconds))
            if told.parts:
                print(row["scheme"][:44], {k: round(1e3 * v, 1) for k, v in parts.items() if v})
    show(cells)


def show(cells: dict[Any, list[tuple[str, float, float]]]) -> None:
    errors, right, pairs, picked = [], 0, 0, 0
    print("| size | k | choices | scheme | measured ms | simulated ms | off |\n|---|---|---|---|---|---|---|")
    for (sizes, k, skew), rows in cells.items():
        for scheme, measured, seconds in rows:
            off = seconds / measured - 1
            errors.append((abs(off), f"{sizes} k={k} {skew} {scheme}", off))
            times = f"{1e3 * measured:.0f} | {1e3 * seconds:.0f} | {100 * off:+.1f} %"
            print(f"| {sizes} | {k} | {skew} | {scheme} | {times} |")
        for (_, m1, s1), (_, m2, s2) in combinations(rows, 2):
            if abs(m1 / m2 - 1) > TIE:
                pairs += 1
                right += (m1 < m2) == (s1 < s2) or abs(s1 / s2 - 1) < 1e-9
        best = min(rows, key=lambda row: row[2])
        picked += best[1] <= 1.05 * min(row[1] for row in rows)
    within, worst = sum(e[0] <= 0.15 for e in errors), max(errors)
    middle = 100 * np.median([e[0] for e in errors])
    print(
        f"{len(errors)} cells, {within} within 15 %, median {middle:.1f} %; worst {worst[1]}: {100 * worst[2]:+.1f} %"
    )
    print(f"order right in {right} of {pairs} pairs that differ by over {TIE:.0%}")
    print(f"fastest by model is the measured fastest, or within 5 % of it, in {picked} of {len(cells)} cases")


if __name__ == "__main__":
    main()
