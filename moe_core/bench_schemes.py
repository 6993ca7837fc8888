"""`twinmoe bench schemes`: one MoE layer, forward and backward, under every scheme on the same synthetic choices.

Schemes take turns step by step, so that a noisy machine disturbs all of them alike. Times are the slowest rank's,
medians over steps; bytes and rows come from the exchanges and are exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..backends.protocol import Communicator, Component, Launch, Parameter, TrainOptions
from ..backends.registry import Backend
from .bench_figures import figures, own_figures, predicted_seconds
from .build import LayerParts, LayerSpec, Runtime, build_layer, make_runtime
from .combinations import mesh_of
from .config import ClusterConfig, Config
from .layer import LayerStats, MoELayer, MoEOutput
from .mesh import Mesh
from .placement import placed_layers
from .plan import Plan
from .planners.static import owners, plan_static, slot_table
from .routing.base import Memo, Tokens
from .swapping import Swapper, swap_policy
from .synthetic import ScriptedRouter, Skew, choose, quick_values
from .topology import Topology, cluster_of_launch, node_of_ranks, topology_of
from .transformer import scoped
from .transport.hierarchical import BYTES

PREFIX = "layers.0.moe."
OverRanks = Callable[[np.ndarray], np.ndarray]
"""Own numbers -> those of all ranks, (ranks, ...)."""
SWAP_STEPS = 24
"""Steps of a warm-up in which experts may swap; they stop earlier when no pair is worth it."""


@dataclass(frozen=True)
class Load:
    """What every scheme of a cell gets: tokens per rank, choices, how many timed steps."""

    tokens: int
    hidden_size: int
    dtype: str
    skew: Skew
    repeats: int
    seed: int = 0


@dataclass
class Contender:
    """One scheme at work on this rank."""

    name: str
    config: Config
    runtime: Runtime
    state: Any
    layer: MoELayer
    loss: Callable[[], tuple[Any, MoEOutput]]
    carry: Callable[[], Any]
    swapper: Swapper | None
    between_nodes: bool
    tensor: Topology
    stats: LayerStats | None = None
    swaps: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"layer": [], "step": [], "transport": []})


def measure_rank(backend: Backend, launch: Launch, options: Mapping[str, Any]) -> dict[str, Any]:
    """All cells on this rank; the report is the same on every rank.

    options: schemes (name -> whole config), skews, top_ks, tokens, hidden_size, dtype, repeats, cluster.
    """
    comm = backend.comm.connect(launch)
    cluster = cluster_of_launch(launch, ClusterConfig.model_validate(options["cluster"]))
    runtimes = Runtimes(backend, comm, cluster)
    rows: list[dict[str, Any]] = []
    for top_k in options["top_ks"]:
        for text in options["skews"]:
            skew = Skew.parse(text, options["repeat_ids"])
            load = Load(
                options["tokens"], options["hidden_size"], options["dtype"], skew, options["repeats"], options["seed"]
            )
            made = [
                _contender(name, _with_top_k(Config.model_validate(raw), top_k), load, backend, runtimes)
                for name, raw in options["schemes"].items()
            ]
            rows += _measure(made, load, backend, comm, runtimes.world)
    comm.close()
    return {"cluster": cluster.model_dump(mode="json"), "ranks": launch.size, "rows": rows}


class Runtimes:
    """One runtime per mesh and kind of transport: groups are made once, in the same order on every rank."""

    def __init__(self, backend: Backend, comm: Communicator, cluster: ClusterConfig) -> None:
        self._backend, self._comm, self._cluster = backend, comm, cluster
        self._made: dict[Any, Runtime] = {}
        self.world = comm.group("world", Mesh(data=comm.size).partition("data"))

    def between_nodes(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks are on several units of the cluster's outermost level but one."""
        return len(set(node_of_ranks(self._cluster, ranks).tolist())) > 1

    def tensor_topology(self, mesh: Mesh) -> Topology:
        """Of the tensor groups of a mesh."""
        return topology_of(self._cluster, mesh.partition("tensor"))

    def of(self, config: Config) -> Runtime:
        mesh = mesh_of(config, self._comm.size)
        key = (mesh, config.parallel.transport == "hierarchical_dedup")
        if key not in self._made:
            self._made[key] = make_runtime(self._backend.ops, self._comm, mesh, config.parallel, self._cluster)
        return self._made[key]


def _with_top_k(config: Config, top_k: int) -> Config:
    return config.model_copy(update={"moe": config.moe.model_copy(update={"top_k": top_k})})


def _contender(name: str, config: Config, load: Load, backend: Backend, runtimes: Runtimes) -> Contender:
    """The layer with the scripted choices of this rank, its trainer, and what is timed."""
    ops, runtime = backend.ops, runtimes.of(config)
    source = runtime.comm.rank // runtime.mesh.tensor
    ids = choose(load.skew, config.moe.num_experts, load.tokens, config.moe.top_k, load.seed + 1000 * source)
    router = ScriptedRouter(ops, load.hidden_size, config.moe.top_k, ids)
    spec = LayerSpec(load.hidden_size, PREFIX, load.seed, router=router)
    parts: LayerParts = build_layer(config.moe, config.parallel, runtime, spec)
    assert isinstance(parts.layer, MoELayer)
    rng = np.random.default_rng(load.seed + source)
    x, dy = (
        ops.cast(ops.asarray(rng.standard_normal((load.tokens, load.hidden_size)).astype(np.float32)), load.dtype)  # type: ignore[arg-type]
        for _ in range(2)
    )
    tokens = Tokens(sequences=1, total=float(load.tokens * runtime.mesh.token_ranks))
    layer = parts.layer

    def forward(params: Mapping[str, Any], what: str) -> Any:
        own = scoped(params, PREFIX)
        x_TD = ops.cast(x * own["w_scale"], load.dtype)  # type: ignore[arg-type]
        if what == "layer":
            return layer(own, x_TD, tokens, Memo())
        return _carry(layer, own, x_TD, tokens)

    # inputs have a gradient, as inside a model: its exchange is part of a step
    scale = Parameter(f"{PREFIX}w_scale", (1,), lambda: np.ones(1), master=True)
    component = Component("moe", (*quick_values(parts.parameters, load.seed), scale), forward)
    state = backend.trainer.build([component], TrainOptions(dtype=load.dtype), runtime.groups, runtime.comm)  # type: ignore[arg-type]

    def loss() -> tuple[Any, MoEOutput]:
        out = state.modules["moe"]("layer")
        return ops.cast((out.y * dy).sum(-1), "float32").sum(-1), out

    swapper = _swapper(config, runtime, load, parts)
    where = (runtimes.between_nodes(runtime.groups["expert"].ranks), runtimes.tensor_topology(runtime.mesh))
    return Contender(name, config, runtime, state, layer, loss, lambda: state.modules["moe"]("carry"), swapper, *where)


def _carry(layer: MoELayer, params: Mapping[str, Any], x_TD: Any, tokens: Tokens) -> Any:
    """Dispatch and combine alone: rows come back as they went."""
    routing = layer.router.route(params, x_TD, tokens, Memo())
    plan = layer.plan(routing, tokens, Memo())
    rows_ND, exchange = layer.transport.dispatch(x_TD, routing, plan)
    return layer.transport.combine(rows_ND, routing.weights_TK, exchange)


def _swapper(config: Config, runtime: Runtime, load: Load, parts: LayerParts) -> Swapper | None:
    if config.parallel.placement != "swap" or runtime.topology is None:
        return None
    depth = runtime.topology.depth if config.parallel.transport == "hierarchical_dedup" else 1
    row_bytes = load.hidden_size * BYTES[load.dtype]
    policy = swap_policy(config.parallel.swap, runtime.topology, depth, row_bytes, 0.0)
    layers = placed_layers({0: parts.layer}, {p.name: p for p in parts.parameters})
    groups, copies = runtime.groups, runtime.mesh.tensor
    return Swapper(runtime.ops, runtime.comm, groups["expert"], groups["world"], policy, layers, copies)


# --- one cell ----------------------------------------------------------------------------------
def _measure(made: Sequence[Contender], load: Load, backend: Backend, comm: Communicator, world: Any) -> list[Any]:
    for contender in made:
        _warm_up(contender, backend)
    peaks = {c.name: _peak(c, backend) for c in made}
    for _ in range(load.repeats):
        for contender in made:
            _step(contender, backend, comm)
    results = []

    def over_ranks(own: np.ndarray) -> np.ndarray:
        return comm.gather_to_host(own, world)

    for contender in made:
        times = np.array([contender.seconds[k] for k in ("layer", "step", "transport")])
        slowest = over_ranks(times).max(0)
        peak = int(over_ranks(np.array([peaks[contender.name]])).max())
        results.append(_row(contender, load, 1e3 * np.median(slowest, 1), peak, over_ranks))
    return results


def _warm_up(contender: Contender, backend: Backend) -> None:
    """Two steps, or as many as swaps go on for."""
    trainer = backend.trainer
    for step in range(SWAP_STEPS if contender.swapper else 2):
        _, out = trainer.accumulate(contender.state, contender.loss)
        trainer.reduce_gradients(contender.state)
        trainer.step(contender.state, 1e-4)
        trainer.evaluate(contender.state, contender.carry)
        contender.stats = out.stats
        if contender.swapper is None:
            continue
        assert out.stats is not None
        contender.swapper.observe([out.stats])
        swaps = contender.swapper.after_step(trainer, contender.state)
        contender.swaps += sum(s is not None for s in swaps)
        if not any(swaps) and step > 0:
            break


def _peak(contender: Contender, backend: Backend) -> int:
    backend.trainer.peak_memory(reset=True)
    backend.trainer.accumulate(contender.state, contender.loss)
    backend.trainer.step(contender.state, 1e-4)
    return backend.trainer.peak_memory()


def _step(contender: Contender, backend: Backend, comm: Communicator) -> None:
    trainer, clock = backend.trainer, _Clock(backend, comm)
    clock.start()
    _, out = trainer.accumulate(contender.state, contender.loss)
    contender.seconds["layer"].append(clock.seconds())
    trainer.reduce_gradients(contender.state)
    trainer.step(contender.state, 1e-4)
    contender.seconds["step"].append(clock.seconds())
    contender.stats = out.stats
    clock.start()
    trainer.evaluate(contender.state, contender.carry)
    contender.seconds["transport"].append(clock.seconds())


class _Clock:
    def __init__(self, backend: Backend, comm: Communicator) -> None:
        self._backend, self._comm, self._began = backend, comm, 0.0

    def start(self) -> None:
        self._backend.trainer.synchronize()
        self._comm.barrier()
        self._began = time.perf_counter()

    def seconds(self) -> float:
        self._backend.trainer.synchronize()
        return time.perf_counter() - self._began


def _row(
    contender: Contender,
    load: Load,
    milliseconds: np.ndarray,
    peak: int,
    over_ranks: Callable[[np.ndarray], np.ndarray],
) -> dict[str, Any]:
    stats, runtime, config = contender.stats, contender.runtime, contender.config
    assert stats is not None
    row = {
        "scheme": contender.name,
        "model_hash": "",
        "top_k": config.moe.top_k,
        "skew": load.skew.text,
        "step_milliseconds": round(float(milliseconds[1]), 3),
        "layer_milliseconds": round(float(milliseconds[0]), 3),
        "transport_milliseconds": round(float(milliseconds[2]), 3),
        "peak_memory_bytes": peak,
        "swaps": contender.swaps,
        "depth": len(stats.exchange.traffic),
    }
    topology = runtime.topology
    if stats.plan is None or topology is None:
        return {**row, "bytes_per_level": {}, "rows_crossing_nodes": 0, "predicted_ceiling": 1.0}
    row_bytes = load.hidden_size * BYTES[load.dtype]
    mine = own_figures(stats, topology, runtime.groups["expert"].index, row_bytes, _flat_plan(contender, load))
    return {
        **row,
        **figures(over_ranks(mine), topology, contender.between_nodes),
        "predicted_milliseconds": round(1e3 * predicted_seconds(stats, topology, contender.tensor), 3),
    }


def _flat_plan(contender: Contender, load: Load) -> Plan:
    """Plain expert parallelism for the choices of this rank's expert group, owners as at the start. No collective."""
    runtime, moe = contender.runtime, contender.config.moe
    ranks = runtime.groups["expert"].size
    first = runtime.mesh.coordinate(runtime.comm.rank, "data") * ranks
    counts = np.zeros((ranks, moe.num_experts), np.int64)
    for r in range(ranks):
        ids = choose(load.skew, moe.num_experts, load.tokens, moe.top_k, load.seed + 1000 * (first + r))
        counts[r] = np.bincount(ids.reshape(-1), minlength=moe.num_experts)
    return plan_static(counts, slot_table(owners(moe.num_experts, ranks), ranks))
