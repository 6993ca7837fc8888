"""Multi-Head LatentMoE beside a plain MoE of equal total and active parameters on the quick-start text. Run by hand:

python tests/bench/heads_training.py [--steps 150] [--seeds 3] [--out FILE]

One process a run. Two projections per layer cost 2 d^2 parameters that every token uses: the plain layers get a shared
expert of as many. The doubled layers have twice the experts and choices, of half the width. First values have the
deviation 1 / sqrt(width) for all: with 0.02, made for widths of a thousand, narrow heads start too quietly.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinmoe.backends import registry
from twinmoe.backends.protocol import Launch
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.model import build_model
from twinmoe.moe_core.train import run

WIDTH = 128
PLAIN = ["moe.num_shared_experts=1", f"moe.shared_expert_hidden_size={WIDTH}", "moe.aux_loss_coeff=0.01"]
HEADS = ["moe.num_heads=4", f"moe.head_dim={WIDTH // 4}", "moe.aux_loss_coeff=0", "moe.bias_update_rate=0.01"]
ONCE = ["moe.num_experts=16", "moe.top_k=4", "moe.expert_hidden_size=128"]
DOUBLED = ["moe.num_experts=32", "moe.top_k=8", "moe.expert_hidden_size=64"]
VARIANTS = {
    "plain": PLAIN + ONCE,
    "heads": HEADS + ONCE,
    "plain, doubled": PLAIN + DOUBLED,
    "heads, doubled": HEADS + DOUBLED,
}


def config_of(name: str, seed: int, steps: int, std: float = 0.09) -> Config:
    common = ["moe.activation=gelu", "moe.softmax_order=after_topk", "moe.z_loss_coeff=0", f"train.seed={seed}"]
    size = [f"train.steps={steps}", "train.global_batch_size=8", "train.sequence_length=128", "train.save_every=0"]
    more = [f"model.init_std={std}", "train.validate_every=0"]
    return load_config("quickstart", [*common, *size, *more, *VARIANTS[name]])


def parameters(config: Config) -> tuple[int, int]:
    """(total, used by a token) of the MoE layers, routers left out."""
    home = registry.load("reference", decided_by="bench")

    def count(comm: Any) -> tuple[int, int]:
        model, moe = build_model(config, make_runtime(home.ops, comm, Mesh())), config.moe
        sizes = {n: spec_size(p.shape) for n, p in model.parameters.items() if ".moe." in n and "router" not in n}
        routed = {n: size for n, size in sizes.items() if n.endswith(("w_up", "w_down")) and "shared" not in n}
        active = sum(sizes.values()) - sum(routed.values()) * (moe.num_experts - moe.top_k) // moe.num_experts
        return sum(sizes.values()), active

    return run_ranks(1, count)[0]


def spec_size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def trained(config: Config) -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        summary = run(config, registry.load("cpu", decided_by="bench"), Launch(), Path(folder))
        seen = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    tail = seen[-10:]
    return {
        "validation_loss": summary["validation_loss"],
        "loss_last": statistics.mean(summary["losses"][-10:]),
        "imbalance": statistics.mean(r["expert_imbalance"] for r in tail),
        "seconds": round(time.perf_counter() - start, 1),
        "bigram_loss": summary["bigram_loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs: dict[str, list[Mapping[str, Any]]] = {name: [] for name in VARIANTS}
    for seed in range(args.seeds):
        for name in VARIANTS:
            runs[name].append(trained(config_of(name, seed, args.steps)))
            print(name, seed, runs[name][-1], flush=True)
            if args.out:
                args.out.write_text(json.dumps(runs, indent=1))
    print("| layer | parameters | used by a token | validation loss | spread | seeds | imbalance |\n|" + "---|" * 7)
    for name, found in runs.items():
        total, active = parameters(config_of(name, 0, args.steps))
        losses = [r["validation_loss"] for r in found]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        each = " ".join(f"{v:.3f}" for v in losses)
        uneven = statistics.mean(r["imbalance"] for r in found)
        mean = statistics.mean(losses)
        print(f"| {name} | {total:,} | {active:,} | {mean:.3f} | {spread:.3f} | {each} | {uneven:.2f} |")


if __name__ == "__main__":
    main()
