"""What a skewed layer holds on its busiest rank: expert parallelism beside LLEP and LAER. Run by hand:

    python tests/bench/skew_memory.py --skew hot:95:8 --json out.json

activation_bytes: floating arrays that operations return in a forward pass (fused experts count their output alone);
kept_bytes: what autograd keeps for backward, borrowed and unsharded weights included, parameters not; peak_bytes: the
largest resident set of forward and backward less that before, processes of their own for each way. Backend `cpu`, 4
gloo ranks. ceiling: plain expert parallelism under this skew over the same under balanced choices.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Launch
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.bench_layer import ByteCounter
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.moe_core.synthetic import ScriptedRouter, Skew, choose
from twinmoe.moe_core.transformer import scoped
from twinmoe.testing.processes import run_processes

LLEP = {"planner": "least_loaded", "residency": "borrowed"}
WAYS: dict[str, dict[str, Any]] = {
    "ep": {},
    "llep": {**LLEP, "least_loaded": {"min_rows": 64}},
    "llep source_first": {**LLEP, "least_loaded": {"min_rows": 64, "spill_order": "source_first"}},
    "laer": {"planner": "relayout", "residency": "fully_sharded"},
    "ep, budget": {"max_rows_per_rank": 0},
}
"""A budget of 0 stands for an equal share of the rows."""
RANKS = 4


def measure(backend: Backend, launch: Launch, sizes: dict[str, Any], skew: str, way: str) -> list[list[int]]:
    """[activation bytes, kept bytes, peak bytes, rows computed] of each rank."""
    comm = backend.comm.connect(launch)
    moe = MoeConfig(num_experts=sizes["experts"], top_k=sizes["top_k"], expert_hidden_size=sizes["expert_hidden"])
    raw = dict(WAYS[way])
    if "max_rows_per_rank" in raw:
        raw["max_rows_per_rank"] = sizes["tokens"] * sizes["top_k"]
    config = ParallelConfig.model_validate(raw)
    counter = ByteCounter(backend.ops)
    runtime = make_runtime(counter.ops, comm, Mesh.over(comm.size, comm.size), config)
    ids = choose(Skew.parse(skew), moe.num_experts, sizes["tokens"], moe.top_k, comm.rank)
    router = ScriptedRouter(counter.ops, sizes["hidden"], moe.top_k, ids)
    parts = build_layer(moe, config, runtime, LayerSpec(sizes["hidden"], "", router=router))
    everyone = comm.gather_to_host(np.array(_call(backend, counter, parts, sizes)), runtime.groups["world"])
    comm.close()
    return everyone.astype(int).tolist()


def _call(backend: Backend, counter: ByteCounter, parts: Any, sizes: dict[str, Any]) -> list[float]:
    import torch

    params = {p.name: torch.tensor(p.initial(), dtype=torch.float32, requires_grad=True) for p in parts.parameters}
    at_rest = {p.untyped_storage().data_ptr() for p in params.values()}
    x = np.random.default_rng(7).standard_normal((sizes["tokens"], sizes["hidden"])).astype(np.float32)
    x_TD = torch.from_numpy(x).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in at_rest:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = Tokens(1, float(sizes["tokens"] * RANKS), training=True)
    if hasattr(parts.layer.planner, "load"):  # LAER uses a layout one call later
        with torch.no_grad():
            for _ in range(3):
                parts.layer(scoped(params, ""), x_TD, tokens, Memo())
    counter.counts = True
    before = backend.trainer.peak_memory(reset=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = parts.layer(scoped(params, ""), x_TD, tokens, Memo())
    counter.counts = False
    rows = int(out.stats.plan.rows_per_rank()[parts.layer.group.index])
    out.y.sum().backward()
    return [counter.bytes, sum(kept.values()), backend.trainer.peak_memory() - before, rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"experts": 32, "top_k": 4, "hidden": 128, "expert_hidden": 256, "tokens": 8192}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--skew", action="append", help="twinmoe bench schemes explains the forms")
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    sizes = {n: getattr(words, n) for n in ("experts", "top_k", "hidden", "expert_hidden", "tokens")}
    report: dict[str, Any] = {"sizes": sizes, "ranks": RANKS, "rows": []}
    target = "twinmoe.testing.bench.skew_memory:measure"

    def run(skew: str, way: str) -> Any:
        return run_processes(RANKS, target, {"sizes": sizes, "skew": skew, "way": way}, "cpu")

    even = run("balanced", "ep")
    for skew in words.skew or ["hot:95:8"]:
        found = {way: run(skew, way) for way in WAYS}
        report["rows"] += [_row(skew, way, found["ep"], own, even) for way, own in found.items()]
    for row in report["rows"]:
        print(" | ".join(str(value) for value in row.values()))
    if words.json:
        words.json.write_text(json.dumps(report, indent=1))


def _row(skew: str, way: str, plain: list[list[int]], own: list[list[int]], even: list[list[int]]) -> dict[str, Any]:
    """Figures of the busiest rank; gains are over plain expert parallelism under the same skew."""
    most, before, best = (np.array(a).max(0) for a in (own, plain, even))
    row: dict[str, Any] = {"skew": skew, "way": way, "rows": int(most[3])}
    for number, name in enumerate(("activation", "kept", "peak")):
        ceiling, gain = before[number] / best[number], before[number] / most[number]
        row[f"{name}_bytes"] = int(most[number])
        row[f"{name}_gain"] = round(float(gain), 2)
        row[f"{name}_ceiling"] = round(float(ceiling), 2)
        row[f"{name}_share"] = round(float(gain / ceiling), 2)
    return row


if __name__ == "__main__":
    main()
