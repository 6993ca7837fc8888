"""How long collectives take at each level of a cluster, and the lines alpha + n beta that fit.

Every rank takes part at once in the groups of its level, so that shared links are measured as they are used. n is
the buffer that one rank sends, its own block included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.protocol import Array, Communicator, Group, Launch, Ops
from ..backends.registry import Backend
from .bench_job import Where, ranks_of, run_task
from .compose import load_config
from .config import ClusterConfig, LevelConfig
from .mesh import Mesh
from .run_folder import check_output
from .topology import Topology, cluster_of_launch, topology_of

SIZES = (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
COLLECTIVES: Mapping[str, Callable[[Communicator, Array, Group], Array]] = {
    "all_to_all": lambda comm, x, group: comm.all_to_all(x, group),
    "all_gather": lambda comm, x, group: comm.all_gather(x, group),
    "all_reduce": lambda comm, x, group: comm.all_reduce(x, group),
}
WIDTH = 64
"""Columns of the float32 buffers."""


@dataclass(frozen=True)
class Measurement:
    """One point: `level` is 'NAME' among all ranks of a unit, 'NAME rails' between the units called NAME."""

    collective: str
    level: str
    bytes: int
    milliseconds: float


@dataclass(frozen=True)
class Fit:
    """alpha in seconds, beta in seconds per byte, and the share of variance explained."""

    collective: str
    level: str
    alpha: float
    beta: float
    r2: float


def measure_rank(
    backend: Backend, launch: Launch, cluster: ClusterConfig, sizes: Sequence[int], repeats: int, names: Sequence[str]
) -> dict[str, Any]:
    """All collectives at all levels on this rank; the report is the same on every rank."""
    comm = backend.comm.connect(launch)
    cluster = cluster_of_launch(launch, cluster)
    topology = topology_of(cluster, [list(range(comm.size))])
    world = comm.group("world", [list(range(comm.size))])
    rows: list[Measurement] = []
    for level, group in level_groups(comm, topology):
        for name in names:
            for size in sizes:
                seconds = _median(backend, comm, world, group, COLLECTIVES[name], size, repeats)
                rows.append(Measurement(name, level, size, round(1e3 * seconds, 4)))
    comm.close()
    return {"cluster": cluster.model_dump(mode="json"), "rows": [vars(r) for r in rows]}


def level_groups(comm: Communicator, topology: Topology) -> list[tuple[str, Group]]:
    """(name of the level, this rank's group): the collectives of the model, outermost first."""
    from .transport.hierarchical import hierarchy_groups

    groups = hierarchy_groups(comm, Mesh(expert=comm.size), topology)
    found = []
    for (number, last), group in sorted(groups.items()):
        found.append((topology.levels[number - 1].name if last else f"{topology.levels[number].name} rails", group))
    return [(name, group) for name, group in found if group.size > 1]


def _median(
    backend: Backend,
    comm: Communicator,
    world: Group,
    group: Group,
    collective: Callable[[Communicator, Array, Group], Array],
    size: int,
    repeats: int,
) -> float:
    """Seconds of the slowest rank, median over repeats; two calls to warm up."""
    ops: Ops = backend.ops
    rows = max(1, size // (4 * WIDTH * group.size)) * group.size
    x = ops.asarray(np.ones((rows, WIDTH), np.float32))
    seconds = []
    for _ in range(repeats + 2):
        comm.barrier()
        backend.trainer.synchronize()
        start = time.perf_counter()
        collective(comm, x, group)
        backend.trainer.synchronize()
        seconds.append(time.perf_counter() - start)
    everyone = comm.gather_to_host(np.array(seconds[2:]), world)
    return float(np.median(everyone.max(0)))


def fit(rows: Sequence[Mapping[str, Any]]) -> list[Fit]:
    """A line through each collective's points."""
    found = []
    for key in dict.fromkeys((r["collective"], r["level"]) for r in rows):
        points = [r for r in rows if (r["collective"], r["level"]) == key]
        alpha, beta, r2 = fit_line([p["bytes"] for p in points], [1e-3 * p["milliseconds"] for p in points])
        found.append(Fit(*key, alpha, beta, r2))
    return found


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """(alpha, beta, r2) of seconds = alpha + sizes * beta, neither negative; squares are weighted by 1 / time."""
    from scipy.optimize import nnls

    n, t = np.asarray(sizes, float), np.asarray(seconds, float)
    scale = n.max()
    weight = 1 / np.sqrt(t)
    solved, _ = nnls(np.stack([np.ones_like(n), n / scale], 1) * weight[:, None], t * weight)
    alpha, beta = float(solved[0]), float(solved[1] / scale)
    spread = float(((t - t.mean()) ** 2).sum())
    left = float(((t - alpha - beta * n) ** 2).sum())
    return alpha, beta, 1.0 - left / spread if spread > 0 else 1.0


def fitted_cluster(cluster: ClusterConfig, fits: Sequence[Fit], ranks: int) -> ClusterConfig:
    """The cluster with the lines of all collectives on its levels."""
    lines = {(f.collective, f.level): f for f in fits}
    topology = topology_of(cluster, [list(range(ranks))])
    inner = {outer.name: inside.name for outer, inside in zip(topology.levels, topology.levels[1:])}

    def of(collective: str, level: LevelConfig) -> dict[str, float]:
        within, rails = lines.get((collective, level.name)), lines.get((collective, f"{inner.get(level.name)} rails"))
        found: dict[str, float] = {}
        if within is not None:
            found |= {"alpha": within.alpha, "beta": within.beta}
        if rails is not None:
            found |= {"rail_alpha": rails.alpha, "rail_beta": rails.beta}
        return found

    def fitted(level: LevelConfig) -> LevelConfig:
        others = [{"name": name, **of(name, level)} for name in COLLECTIVES if name != "all_to_all" and of(name, level)]
        return LevelConfig.model_validate(
            {**level.model_dump(), **of("all_to_all", level), "collectives": others or level.collectives}
        )

    return cluster.model_copy(update={"levels": tuple(fitted(level) for level in cluster.levels)})


def report(measured: Mapping[str, Any], with_fit: bool, ranks: int) -> dict[str, Any]:
    """The JSON of `bench comm`."""
    rows = measured["rows"]
    if not with_fit:
        return {"cluster": measured["cluster"], "rows": rows, "fit": []}
    fits = fit(rows)
    cluster = fitted_cluster(ClusterConfig.model_validate(measured["cluster"]), fits, ranks)
    return {"cluster": cluster.model_dump(mode="json"), "rows": rows, "fit": [vars(f) for f in fits]}


@dataclass(frozen=True)
class CommRequest:
    """The command line of `bench comm`. cluster: packaged name or path; out: where the fitted cluster file goes."""

    where: Where
    cluster: str | None = None
    with_fit: bool = False
    out: Path | None = None
    sizes: tuple[int, ...] = SIZES
    repeats: int = 15
    collectives: tuple[str, ...] = tuple(COLLECTIVES)


def run(request: CommRequest) -> dict[str, Any]:
    """The JSON of `bench comm`. ConfigError for a wrong request; JobFailedError when ranks fail."""
    words = [f"cluster={request.cluster}"] if request.cluster else []
    cluster = load_config({}, words).cluster
    check_output(request.out, new=True)
    options = {
        "cluster": cluster.model_dump(mode="json"),
        "sizes": list(request.sizes),
        "repeats": request.repeats,
        "collectives": list(request.collectives),
    }
    measured = run_task("bench_comm", options, request.where)
    named: dict[str, Any] = {"link": request.where.link} if request.where.link else {}
    result = named | report(measured, request.with_fit or request.out is not None, ranks_of(request.where))
    if request.out is not None:
        request.out.write_text(cluster_text(result["cluster"]), encoding="utf-8")
    return result


def cluster_text(cluster: Mapping[str, Any]) -> str:
    """A cluster file that `cluster: PATH` reads."""
    import yaml

    def told(section: Mapping[str, Any]) -> dict[str, Any]:
        found = {k: v for k, v in section.items() if k == "size" or not (v is None or v is False or v in ((), []))}
        return {**found, "collectives": [told(c) for c in found["collectives"]]} if "collectives" in found else found

    levels = [told(level) for level in cluster["levels"]]
    return yaml.safe_dump({"cluster": {"name": cluster["name"], "levels": levels}}, sort_keys=False)
