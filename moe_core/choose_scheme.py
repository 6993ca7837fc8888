"""`twinmoe plan`: which way of running a layer a cluster should take, and why. Never one that changes the function.

Every scheme is tried with the sizes of its groups, then the best of each scheme with its own settings one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .combinations import ConfigError, check_combinations, mesh_of
from .compose import AXES, validate
from .config import Config, ParallelConfig
from .packaged import folder
from .shapes import moe_layers
from .simulate import StepCost, Task, simulate
from .simulate_rates import Rates
from .simulate_trace import alike, source_of
from .topology import topology_of
from .trace import Trace
from .yaml_text import parse_file

SCHEMES = ("ep", "llep", "hiermoe", "laer", "fsdp_ep", "groupwise")
LARGEST_GROUP = 256
SWAPPED_EXPERTS = 64
"""Most experts for which a swap is searched: its search is quadratic in them."""
PARTS: Mapping[str, tuple[str, ...]] = {
    "exchanges of rows": ("plan", "dispatch", "combine", "backward_exchanges", "tensor"),
    "experts' compute": ("compute", "backward_compute", "recompute"),
    "moving weights": ("weights", "backward_weights"),
    "rearranging rows": ("copies",),
    "dense layers": ("dense", "dense_sums"),
    "reducing gradients": ("reduce",),
    "the optimizer": ("optimizer",),
}
"""Resources in words -> parts of a simulated step."""


@dataclass(frozen=True)
class Way:
    """One way of running. scheme: its packaged name; changes: keys of `parallel` and their values."""

    scheme: str
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return ",".join([self.scheme, *(f"{key}={value}" for key, value in self.changes)])

    def with_(self, **changes: Any) -> Way:
        keys = {key.replace("__", "."): value for key, value in changes.items()}
        return replace(self, changes=tuple((dict(self.changes) | keys).items()))


@dataclass(frozen=True, eq=False)
class Advice:
    """ranked: ways that fit the memory, fastest first; left_out: those that need more. limit: bytes, None unknown."""

    ranked: list[StepCost]
    left_out: list[StepCost]
    limit: int | None

    @property
    def winner(self) -> StepCost:
        return self.ranked[0]

    def sentences(self) -> list[str]:
        """Three: what wins and what binds it, what the runner-up loses, what memory allows."""
        return [_won(self.winner), _lost(self.winner, self.ranked), _memory(self.winner, self.limit, self.left_out)]

    def as_dict(self) -> dict[str, Any]:
        return {
            "winner": self.winner.name,
            "parallel": scheme_of(self.winner.config),
            "sentences": self.sentences(),
            "rows": [cost.as_dict() for cost in self.ranked],
            "left_out": [cost.as_dict() for cost in self.left_out],
        }


def advise(config: Config, ranks: int, trace: Trace, rates: Rates) -> Advice:
    """The ways that `config` allows on so many ranks, by simulated step. ConfigError where none fits the memory."""
    limit = config.cluster.device_memory_bytes
    first = _costs(config, ranks, trace, rates, list(_sizes(config, ranks)))
    best = [_fastest(group, limit) for group in _by_scheme(first).values()]
    least = min(cost.total for cost, _ in best)
    second = [changed for cost, way in best if cost.total <= 2 * least for changed in _settings(way, config, cost)]
    found = first + _costs(config, ranks, trace, rates, second)
    ordered = sorted((cost for cost, _ in found), key=lambda cost: (cost.total, len(cost.name), cost.name))
    fits = [cost for cost in ordered if limit is None or cost.memory <= limit]
    if not fits:
        least = min(ordered, key=lambda cost: cost.memory)
        raise ConfigError(
            f"no way fits {limit} bytes a rank: {least.name} needs least, {least.memory}; use more ranks, a smaller "
            "micro-batch or train.recompute=layer"
        )
    return Advice(fits, [cost for cost in ordered if cost not in fits], limit)


Found = tuple[StepCost, Way]


def _costs(config: Config, ranks: int, trace: Trace, rates: Rates, ways: Sequence[Way]) -> list[Found]:
    """Simulated together where they share a mesh, so that the choices are spread over ranks once."""
    by_mesh: dict[Any, dict[Way, Config]] = {}
    for way in ways:
        made = _config_of(way, config)
        if made is None:
            continue
        try:
            mesh = mesh_of(made, ranks)
        except ConfigError:
            continue
        if mesh.expert <= min(LARGEST_GROUP, config.moe.num_experts) and _shared(made, mesh.token_ranks):
            by_mesh.setdefault(mesh, {})[way] = made
    found: list[Found] = []
    for mesh, made in by_mesh.items():
        some = next(iter(made.values()))
        task = Task(source_of(trace, some, mesh), alike=alike(trace, moe_layers(config)))
        costs = simulate({way.name: c for way, c in made.items()}, ranks, task, rates)
        found += zip(costs, made, strict=True)
    return found


def _shared(config: Config, token_ranks: int) -> bool:
    """Whether sequences can be shared equally."""
    sequences, micro = config.train.global_batch_size, config.train.micro_batch_size
    return sequences % token_ranks == 0 and (micro is None or sequences // token_ranks % micro == 0)


def _config_of(way: Way, config: Config) -> Config | None:
    """The config of a way; None where its options do not combine."""
    raw = config.model_dump(mode="json")
    file = parse_file(folder() / "schemes" / f"{way.scheme}.yaml")["parallel"]
    kept = {key: raw["parallel"][key] for key in ("head_parallel_size", "data_assignment")}
    parallel = {**ParallelConfig().model_dump(mode="json"), **kept, **file}
    for key, value in way.changes:
        section, _, name = key.rpartition(".")
        (parallel[section] if section else parallel)[name] = value
    try:
        made = validate({**raw, "parallel": parallel})
        check_combinations(made)
    except ConfigError:
        return None
    return made


def _sizes(config: Config, ranks: int) -> Iterable[Way]:
    """Schemes with the sizes of their groups: whole nodes, halves of the largest group; tensor groups inside a node."""
    node = config.cluster.levels[0].size or ranks
    tensors = sorted({1, config.parallel.tensor_parallel_size, *(t for t in (2, 4, 8) if t <= node)})
    for scheme in SCHEMES:
        for tensor in tensors:
            if (tensor == 1) == (scheme == "groupwise") or (tensor > 1 and scheme in ("laer", "fsdp_ep")):
                continue
            for expert in _groups(config, ranks // tensor):
                changes: dict[str, Any] = {"expert_parallel_size": expert, "tensor_parallel_size": tensor}
                if scheme == "hiermoe" and config.moe.num_experts > SWAPPED_EXPERTS:
                    changes["placement"] = "fixed"
                yield Way(scheme, tuple(changes.items()))


def _groups(config: Config, ranks: int) -> list[int]:
    """Sizes of expert groups worth a try, the largest first: at most four."""
    most = min(ranks, config.moe.num_experts, LARGEST_GROUP)
    fitting = [n for n in range(1, most + 1) if ranks % n == 0 and config.moe.num_experts % n == 0]
    return fitting[::-1][:4]


def _settings(way: Way, config: Config, cost: StepCost) -> list[Way]:
    """The way with one of its scheme's own settings changed, and exchanges overlapped."""
    found: list[Way] = []
    if way.scheme == "llep":
        found += [way.with_(least_loaded__spill_order="source_first")]
        found += [way.with_(least_loaded__min_rows=rows) for rows in (64, 256, 4096)]
        found += [way.with_(least_loaded__alpha="5/4"), way.with_(least_loaded__imbalance_threshold="2")]
        found += [way.with_(least_loaded__min_rows=64, least_loaded__spill_order="source_first")]
    if way.scheme == "hiermoe":
        deepest = topology_of(config.cluster, cost.mesh.partition("expert")).depth
        found += [way.with_(placement="fixed", hierarchy_depth=d) for d in range(1, deepest + 1)]
    if way.scheme == "laer":
        share = -(-config.moe.num_experts // cost.mesh.expert)
        found += [way.with_(slots_per_rank=share + more) for more in {2, share} if more > 1]
    if way.scheme in ("ep", "llep", "groupwise"):
        found += [way.with_(overlap_chunks=chunks) for chunks in (2, 4) if cost.mesh.expert > 1]
    return found


def _by_scheme(found: Sequence[Found]) -> dict[str, list[Found]]:
    groups: dict[str, list[Found]] = {}
    for cost, way in found:
        groups.setdefault(way.scheme, []).append((cost, way))
    if not groups:
        raise ConfigError(
            "no scheme divides the sequences among these ranks; change train.global_batch_size or --ranks"
        )
    return groups


def _fastest(group: Sequence[Found], limit: int | None) -> Found:
    fits = [f for f in group if limit is None or f[0].memory <= limit]
    return min(fits or group, key=lambda f: (f[0].total, f[0].name))


# --- words -------------------------------------------------------------------------------------
def _shares(cost: StepCost) -> dict[str, float]:
    return {words: cost.part(*parts) for words, parts in PARTS.items()}


def _won(cost: StepCost) -> str:
    shares = _shares(cost)
    binding = max(shares, key=lambda words: shares[words])
    return (
        f"{cost.name} takes {_time(cost.total)} a step; {binding} bind it with "
        f"{100 * shares[binding] / cost.total:.0f} % of the time (busiest rank {cost.straggler:.2f} times the mean)."
    )


def _lost(cost: StepCost, ranked: Sequence[StepCost]) -> str:
    others = [c for c in ranked if c.name.split(",")[0] != cost.name.split(",")[0]]
    if not others:
        return "No other scheme can run here."
    mine, theirs = _shares(cost), _shares(others[0])
    worst = max(mine, key=lambda words: theirs[words] - mine[words])
    more = others[0].total - cost.total
    return (
        f"The best of another scheme, {others[0].name}, takes {_time(others[0].total)} "
        f"({100 * more / cost.total:+.1f} %): it loses most in {worst} ({_time(theirs[worst] - mine[worst])})."
    )


def _memory(cost: StepCost, limit: int | None, left_out: Sequence[StepCost]) -> str:
    needs = f"It needs about {cost.memory / 2**30:.3g} GiB a rank"
    if limit is None:
        return f"{needs}; the cluster file names no device_memory_bytes, so nothing was left out."
    out = f"; {len(left_out)} ways that need more were left out" if left_out else ", and so all ways fit"
    return f"{needs} of {limit / 2**30:.3g} GiB{out}."


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


# --- a file ------------------------------------------------------------------------------------
def scheme_of(config: Config) -> dict[str, Any]:
    """`parallel` of a config: its scheme, the axes, and what differs from the defaults."""
    whole, usual = config.parallel.model_dump(mode="json"), ParallelConfig().model_dump(mode="json")
    chosen: dict[str, Any] = {"scheme": whole["scheme"]}
    for key, value in whole.items():
        if isinstance(value, dict):
            changed = {k: v for k, v in value.items() if v != usual[key][k]}
            chosen |= {key: changed} if changed else {}
        elif key in AXES or value != usual[key]:
            chosen[key] = value
    return chosen


def write_scheme(config: Config, path: Path, sentences: Sequence[str]) -> None:
    """A scheme file with the reasons above it, for `parallel.scheme=PATH`. ConfigError where it exists."""
    if path.exists():
        raise ConfigError(f"{path} exists; name another file")
    text = "".join(f"# {sentence}\n" for sentence in sentences)
    path.write_text(text + yaml.safe_dump({"parallel": scheme_of(config)}, sort_keys=False), encoding="utf-8")
