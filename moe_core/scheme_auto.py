"""`parallel.scheme: auto`: decided once, at the start, by what `plan` advises; at the end of a run only said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .choose_scheme import advise
from .combinations import ConfigError
from .compose import AUTO, load_config
from .config import Config
from .run_folder import CONFIG
from .simulate_request import rates_of, trace_of
from .trace_record import FOLDER

SKEW = "zipf:0.5"
"""Of the choices that are assumed before a run has made any."""
EVERY = 50
"""Steps between recorded ones of a run that may be advised otherwise."""


@dataclass(frozen=True)
class Settled:
    """The config with a scheme, and why."""

    config: Config
    reasons: tuple[str, ...] = ()


def settled(config: Config, ranks: int, resumed: Path | None = None) -> Settled:
    """A config without `auto`. resumed: a run folder whose decision stands.

    Plain expert parallelism where nothing was measured. ConfigError where no way fits the memory.
    """
    if config.parallel.scheme != AUTO:
        return Settled(config)
    if resumed is not None and (resumed / CONFIG).exists():
        before = load_config(resumed / CONFIG)
        return Settled(_with(config, before), ("the scheme stays what the run began with",))
    missing = _unmeasured(config)
    if missing is not None:
        plain = load_config({}, ["parallel.scheme=ep"])
        kept = config.parallel.model_copy(update={"scheme": plain.parallel.scheme})
        return Settled(config.model_copy(update={"parallel": kept}), (f"scheme auto is ep: {missing}",))
    advice = advise(config, ranks, trace_of(config, None, SKEW), rates_of(config))
    reasons = (f"scheme auto, for choices like {SKEW}: {advice.sentences()[0]}", *advice.sentences()[1:])
    return Settled(_with(config, advice.winner.config), reasons)


def _with(config: Config, chosen: Config) -> Config:
    """The chosen way, recorded now and then so that it can be judged."""
    every = config.train.trace_every or (EVERY if config.moe.num_heads == 1 else 0)
    train = config.train.model_copy(update={"trace_every": every})
    return config.model_copy(update={"parallel": chosen.parallel, "train": train})


def _unmeasured(config: Config) -> str | None:
    cluster = config.cluster
    if config.moe.num_heads > 1:
        return "layers of several heads are not simulated"
    if not any(level.beta for level in cluster.levels):
        return f"no link of the cluster {cluster.name} was measured; run `twinmoe bench comm --fit --out FILE`"
    if cluster.device_teraflops is None:
        return f"cluster.device_teraflops of {cluster.name} is not set; run `twinmoe bench layer`"
    return None


def advice_line(config: Config, ranks: int, run_dir: Path) -> str | None:
    """What `plan` would choose now that the run has recorded its choices; None where it can't tell."""
    try:
        advice = advise(config, ranks, trace_of(config, run_dir / FOLDER, SKEW), rates_of(config))
    except ConfigError:
        return None
    return f"with the recorded choices: {advice.sentences()[0]} This run used {config.parallel.scheme}."
