"""Layer forward and backward over real sockets: head parallel beside flat and deduplicated expert parallelism.

python tests/bench/heads_layer.py [--ks 1 2 4 8] [--tokens 1024] ...            four local processes
python tests/bench/heads_layer.py --testbed 2x2 --rate 200mbit                  two shaped nodes (root)

With a rate, times stand beside a prediction: the compute of the same rows without any exchange, plus the predicted
bytes of the four exchanges over a node's link. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from twinmoe.backends import registry
from twinmoe.backends.protocol import Communicator, Launch
from twinmoe.backends.registry import worker_environment
from twinmoe.backends.torch_shared import ops
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.config import ClusterConfig, LevelConfig, MoeConfig, ParallelConfig
from twinmoe.moe_core.heads_traffic import Layer, deduplicated, flat, head_parallel
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.moe_core.testbed import Shape as TestbedShape
from twinmoe.moe_core.testbed import Testbed, run_ranks
from twinmoe.moe_core.transformer import scoped
from twinmoe.testing.processes import free_port, run_processes


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer on a rank, and of the job; rate of a node's link in Mbit/s (0: not shaped)."""

    tokens: int = 1024
    width: int = 256
    heads: int = 4
    experts: int = 32
    hidden: int = 64
    steps: int = 7
    nodes: int = 1
    rate: float = 0.0


@dataclass(frozen=True)
class Way:
    """How a layer's work is shared. bytes_between(layer, ranks of a node): predicted, per rank and exchange."""

    name: str
    heads: bool
    shared: bool = True
    transport: str = "flat"
    chunks: int = 1
    bytes_between: Callable[[Layer, int], float] = lambda layer, group: 0.0


WAYS = (
    Way("hp", True, bytes_between=head_parallel),
    Way("hp_halves", True, chunks=2, bytes_between=head_parallel),
    Way("ep", False, bytes_between=flat),
    Way("ep_dedup", False, transport="hierarchical_dedup", bytes_between=deduplicated),
    Way("hp_alone", True, shared=False),
    Way("ep_alone", False, shared=False),
)
"""`alone`: every rank has all heads or experts and sends nothing: the compute of the same rows."""


def step_of(comm: Communicator, way: Way, shape: Shape, top_k: int) -> Callable[[], None]:
    """One forward and backward of the layer on this rank."""
    moe = MoeConfig(
        num_experts=shape.experts,
        top_k=top_k,
        expert_hidden_size=shape.hidden,
        activation="gelu",
        aux_loss_coeff=0.0,
        num_heads=shape.heads if way.heads else 1,
        head_dim=shape.width // shape.heads if way.heads else None,
    )
    shared = comm.size if way.shared else 1
    mesh = Mesh.over(comm.size, head=shared) if way.heads else Mesh.over(comm.size, expert=shared)
    levels = (LevelConfig(name="node", size=comm.size // shape.nodes), LevelConfig(name="cluster"))
    cluster = ClusterConfig(levels=levels if shape.nodes > 1 and way.shared else levels[1:])
    parallel = ParallelConfig.model_validate({"transport": way.transport, "head_chunks": way.chunks})
    runtime = make_runtime(ops, comm, mesh, parallel, cluster)  # type: ignore[arg-type]
    parts = build_layer(moe, parallel, runtime, LayerSpec(shape.width, "moe."))
    leaves = {p.name: torch.tensor(p.initial(), dtype=torch.float32, requires_grad=True) for p in parts.parameters}
    rng = np.random.default_rng(comm.rank)
    x = torch.tensor(rng.normal(size=(shape.tokens, shape.width)), dtype=torch.float32, requires_grad=True)
    tokens = Tokens(2, float(shape.tokens * comm.size), global_sequences=2 * comm.size, training=top_k > 1)

    def step() -> None:
        parts.layer(scoped(leaves, "moe."), x, tokens, Memo()).y.sum().backward()

    return step


def seconds(comm: Communicator, step: Callable[[], None], steps: int) -> float:
    """Median over steps of the slowest rank."""
    world = comm.group("timing", [list(range(comm.size))])
    step()
    times = []
    for _ in range(steps):
        comm.barrier()
        start = time.perf_counter()
        step()
        times.append(float(comm.gather_to_host(np.array(time.perf_counter() - start), world).max()))
    return statistics.median(times)


def row(comm: Communicator, shape: Shape, top_k: int) -> dict[str, Any]:
    """Times of all ways at one k, in ms; wire: bytes between nodes at the rate, of both directions' four exchanges."""
    layer = Layer(shape.tokens, shape.width, comm.size, top_k, shape.experts, itemsize=4)
    node = comm.size // shape.nodes
    times = {way.name: 1e3 * seconds(comm, step_of(comm, way, shape, top_k), shape.steps) for way in WAYS}
    found: dict[str, Any] = {"top_k": top_k, **{f"{name}_ms": round(ms, 2) for name, ms in times.items()}}
    if not shape.rate:
        return found
    predicted = {}
    for way in WAYS[:4]:
        wire = 4 * node * way.bytes_between(layer, node) * 8 / (shape.rate * 1e3)
        predicted[way.name] = times["hp_alone" if way.heads else "ep_alone"] + wire
        found[f"{way.name}_predicted_ms"] = round(predicted[way.name], 2)
    for other in ("ep", "ep_dedup"):
        ratio, ceiling = times[other] / times["hp"], predicted[other] / predicted["hp"]
        found[f"{other}_over_hp"] = round(ratio, 3)
        found[f"{other}_over_hp_ceiling"] = round(ceiling, 3)
    return found


def run(backend: registry.Backend, launch: Launch, shape: dict[str, Any], ks: list[int]) -> dict[str, Any]:
    """All rows, on every rank."""
    torch.set_num_threads(1)
    comm = backend.comm.connect(launch)
    rows = [row(comm, Shape(**shape), k) for k in ks]
    comm.barrier()
    return {"shape": shape, "ranks": comm.size, "rows": rows}


def on_testbed(testbed: str, rate: str | None, shape: dict[str, Any], ks: list[int]) -> dict[str, Any]:
    """`run` on ranks in namespaces."""
    kind = TestbedShape.parse(testbed, rate)
    mbit = 0.0 if rate is None else float(rate[:-4]) * {"k": 1e-3, "m": 1.0, "g": 1e3}[rate[-4]]
    with tempfile.TemporaryDirectory() as name, Testbed(kind) as bed:
        order, log = Path(name) / "order.json", Path(name) / "log"
        order.write_text(json.dumps({"shape": {**shape, "nodes": kind.nodes, "rate": mbit}, "ks": ks}))
        words = [sys.executable, __file__, "--worker", str(order)]
        status = run_ranks(bed, words, worker_environment(str(Path(sys.executable).parent)), free_port(), log, 900)
        if any(status):
            raise SystemExit(log.read_text()[-3000:])
        return json.loads(order.with_suffix(".result").read_text())


def worker(order: Path) -> None:
    launch = registry.read_launch()
    result = run(registry.load("cpu", decided_by="bench"), launch, **json.loads(order.read_text()))
    if launch.rank == 0:
        order.with_suffix(".result").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--testbed")
    parser.add_argument("--rate")
    parser.add_argument("--worker", type=Path)
    sizes = {name: value for name, value in asdict(Shape()).items() if name not in ("nodes", "rate")}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
    shape = {name: getattr(args, name) for name in sizes}
    if args.testbed:
        found = on_testbed(args.testbed, args.rate, shape, args.ks)
    else:
        found = run_processes(4, "twinmoe.testing.bench.heads_layer:run", {"shape": shape, "ks": args.ks}, seconds=900)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
