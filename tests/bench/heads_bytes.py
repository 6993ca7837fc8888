"""Bytes that a rank sends in one exchange, counted from the collectives of virtual ranks, as a table. Run by hand:

python tests/bench/heads_bytes.py [--ranks 4] [--tokens 64] [--width 256] [--experts 32]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from twinmoe.backends import reference
from twinmoe.backends.reference.comm import Communicator, run_ranks
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.config import ClusterConfig, LevelConfig, MoeConfig, ParallelConfig
from twinmoe.moe_core.heads_traffic import Layer, deduplicated, flat, head_parallel
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.moe_core.transformer import scoped


@dataclass(frozen=True)
class Way:
    """One of the three ways to share a layer's experts among ranks."""

    name: str
    heads: bool
    transport: str


WAYS = (
    Way("head parallel", True, "flat"),
    Way("flat", False, "flat"),
    Way("deduplicated", False, "hierarchical_dedup"),
)


def dispatched(comm: Communicator, way: Way, layer: Layer) -> int:
    """Bytes of the dispatch in float64: the first exchange that is not of counts."""
    moe = MoeConfig(num_experts=layer.experts, top_k=layer.top_k, expert_hidden_size=4, aux_loss_coeff=0.0)
    if way.heads:
        heads = {"num_heads": 2 * layer.ranks, "head_dim": layer.width // (2 * layer.ranks)}
        moe = moe.model_copy(update=heads)
    mesh = Mesh.over(layer.ranks, head=layer.ranks) if way.heads else Mesh.over(layer.ranks, expert=layer.ranks)
    parallel = ParallelConfig.model_validate({"transport": way.transport, "hierarchy_depth": 1})
    cluster = ClusterConfig(levels=(LevelConfig(name="host"),))
    runtime = make_runtime(reference.ops, comm, mesh, parallel, cluster)
    parts = build_layer(moe, parallel, runtime, LayerSpec(layer.width, "moe."))
    params = scoped({p.name: reference.ops.asarray(p.initial()) for p in parts.parameters}, "moe.")
    rng = np.random.default_rng(comm.rank)
    x = reference.ops.asarray(rng.normal(size=(layer.tokens, layer.width)))
    mark = len(comm.log)
    tokens = Tokens(1, float(layer.tokens * layer.ranks), global_sequences=layer.ranks, training=layer.top_k > 1)
    parts.layer(params, x, tokens, Memo())
    sent = [c.bytes_sent for c in comm.log[mark:] if c.name == "all_to_all"]
    return next(n for n in sent if n > max(sent) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("ranks", 4), ("tokens", 64), ("width", 256), ("experts", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    print("| k | " + " | ".join(f"{w.name}: counted | predicted" for w in WAYS) + " |")
    print("|---" * 7 + "|")
    for k in (1, 2, 4, 8):
        layer = Layer(args.tokens, args.width, args.ranks, k, args.experts, itemsize=8)
        predicted = (head_parallel(layer), flat(layer), deduplicated(layer))
        cells = []
        for way, bytes_predicted in zip(WAYS, predicted, strict=True):
            counted = np.mean(run_ranks(args.ranks, lambda comm, w=way, at=layer: dispatched(comm, w, at)))
            cells += [f"{counted:,.0f}", f"{bytes_predicted:,.0f}"]
        print(f"| {k} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
