"""What `twinmoe simulate` and `plan` were asked: a config, a cluster, choices, rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .choose_scheme import Advice, advise
from .combinations import ConfigError, mesh_of
from .compose import load_config
from .config import Config
from .shapes import moe_layers
from .simulate import BYTES, Task, simulate
from .simulate_rates import Rates, rates_of_bench, rates_of_teraflops, shape_of
from .simulate_trace import alike, source_of
from .synthetic import Skew
from .trace import Trace, read
from .trace_make import Synthetic, record_trace

SCHEMES = ("ep", "llep", "hiermoe,placement=fixed", "laer", "fsdp_ep")
SAMPLE_RANKS = 8
"""Ranks of made-up choices; where there are more they take theirs in turn."""
SAMPLE_TOKENS = 2048


@dataclass(frozen=True)
class Question:
    """trace wins over skew; layer: reports of `bench layer --json`, else the cluster's device_teraflops."""

    config: str
    overrides: tuple[str, ...] = ()
    ranks: int = 8
    cluster: str | None = None
    trace: Path | None = None
    skew: str = "zipf:0.5"
    layer: tuple[Path, ...] = ()

    @property
    def words(self) -> list[str]:
        return [*([f"cluster={self.cluster}"] if self.cluster else []), *self.overrides]


def simulate_schemes(question: Question, schemes: Sequence[str] | None = None) -> dict[str, Any]:
    """The JSON of `simulate`. ConfigError for a wrong request."""
    config = _measured(load_config(question.config, question.words))
    rates = rates_of(config, question.layer)
    trace = trace_of(config, question.trace, question.skew)
    rows = []
    for text in schemes or SCHEMES:
        name, *settings = text.split(",")
        words = [s if s.startswith(("parallel.", "train.")) else f"parallel.{s}" for s in settings]
        way = load_config(question.config, [*question.words, f"parallel.scheme={name}", *words])
        mesh = mesh_of(way, question.ranks)
        task = Task(source_of(trace, way, mesh), alike=alike(trace, moe_layers(way)))
        rows += [cost.as_dict() for cost in simulate({text: way}, question.ranks, task, rates)]
    return {"ranks": question.ranks, "cluster": config.cluster.name, "rates": rates.note, "rows": rows}


def plan_ways(question: Question) -> tuple[Advice, Rates]:
    """What `plan` advises, and the rates that it used. ConfigError for a wrong request."""
    config = _measured(load_config(question.config, question.words))
    rates = rates_of(config, question.layer)
    return advise(config, question.ranks, trace_of(config, question.trace, question.skew), rates), rates


def _measured(config: Config) -> Config:
    """ConfigError where exchanges would cost nothing."""
    if not any(level.beta for level in config.cluster.levels):
        raise ConfigError(
            f"no link of the cluster {config.cluster.name} was measured; run `twinmoe bench comm --fit --out FILE` and "
            "add --cluster FILE"
        )
    return config


def trace_of(config: Config, path: Path | None, skew: str) -> Trace:
    """The trace, or one step of made-up choices of one layer."""
    if path is not None:
        return read(path)
    wanted = Skew.parse(skew)
    wanted.check(config.moe.num_experts, config.moe.top_k)
    made = Synthetic(wanted, config.moe.num_experts, config.moe.top_k, SAMPLE_RANKS, SAMPLE_TOKENS)
    return record_trace(made)


def rates_of(config: Config, reports: Sequence[Path] = ()) -> Rates:
    """From reports of `bench layer`, else from what the cluster file says of a device. ConfigError without either."""
    shape = shape_of(config, BYTES[config.train.dtype])
    if reports:
        return rates_of_bench([_report(path) for path in reports], shape)
    teraflops = config.cluster.device_teraflops
    if teraflops is None:
        raise ConfigError(
            f"the cluster {config.cluster.name} does not say how fast a device computes; add --layer FILE of `twinmoe "
            "bench layer --json`, or cluster.device_teraflops"
        )
    return rates_of_teraflops(teraflops, shape)


def _report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        assert report["rows"]
        assert report["tokens"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ConfigError(f"{path} is not what `twinmoe bench layer --json` prints; name such a file") from None
    return report
