"""How long a simulation takes: 256 experts on expert groups of 256, choices of every group drawn apart.

    python tests/bench/simulate_scale.py 4096 61        ranks, layers

Prints seconds, peak memory, and each scheme's step.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

import numpy as np
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.simulate import Choices, Task, simulate
from twinmoe.moe_core.simulate_rates import rates_of_teraflops, shape_of

EXPERTS, TOP_K, TOKENS, SAMPLED, GROUP = 256, 8, 4096, 4096, 256
SCHEMES = ("ep", "llep", "hiermoe", "laer", "fsdp_ep", "groupwise")


def source_of(ranks: int):
    """Zipf's shares to the power 0.6, permuted in every layer; each rank draws its tokens' experts."""
    shares = np.arange(1, EXPERTS + 1) ** -0.6
    shares /= shares.sum()

    def source(layer: int) -> Sequence[Sequence[Choices]]:
        rng = np.random.default_rng(layer)
        permuted = rng.permutation(shares)
        counts = rng.multinomial(TOKENS * TOP_K, permuted, size=ranks).astype(np.int32)
        noise = rng.gumbel(size=(SAMPLED, EXPERTS))
        ids = np.argsort(-(np.log(permuted) + noise), axis=1)[:, :TOP_K]
        return [[Choices(counts, ids, np.arange(SAMPLED) % ranks)]]

    return source


def main() -> None:
    ranks, layers = int(sys.argv[1]), int(sys.argv[2])
    words = ["cluster=dgx_h100", f"model.num_layers={layers}", f"moe.num_experts={EXPERTS}", f"moe.top_k={TOP_K}"]
    words += ["model.hidden_size=7168", "moe.expert_hidden_size=2048", "model.num_attention_heads=56"]
    words += ["train.dtype=bfloat16", f"train.global_batch_size={ranks}", f"train.sequence_length={TOKENS}"]
    ways = {}
    for scheme in SCHEMES:
        size = min(GROUP, ranks) // (2 if scheme == "groupwise" else 1)
        more = ["parallel.placement=fixed"] if scheme == "hiermoe" else []
        ways[scheme] = load_config(
            {}, [*words, f"parallel.scheme={scheme}", f"parallel.expert_parallel_size={size}", *more]
        )
    began, cpu = time.perf_counter(), time.process_time()
    costs = simulate(ways, ranks, Task(source_of(ranks)), rates_of_teraflops(400, shape_of(ways["ep"], 2)))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall, used = time.perf_counter() - began, time.process_time() - cpu
    print(f"{ranks} ranks x {layers} layers: {wall:.1f} s, {used:.1f} s of CPU, {memory:.2f} GiB")
    for cost in costs:
        print(
            f"{cost.name:10} {1e3 * cost.total:9.0f} ms  busiest {cost.straggler:5.2f}  {cost.groups} distinct groups"
        )


if __name__ == "__main__":
    main()
