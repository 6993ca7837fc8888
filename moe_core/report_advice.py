"""What `plan` would choose for a run, by the last choices that its routers made; or why it can't tell."""

from __future__ import annotations

from .choose_scheme import advise
from .combinations import ConfigError
from .compare_figures import RunFolder
from .simulate_request import rates_of
from .trace import Trace, read
from .trace_record import FOLDER


def advice_of(run: RunFolder) -> str:
    """A few sentences."""
    if not (run.path / FOLDER).is_dir():
        return "This run recorded no choices; train.trace_every=50 keeps those of every 50th step."
    if not any(level.beta for level in run.config.cluster.levels):
        return f"No link of the cluster {run.config.cluster.name} was measured; `twinmoe bench comm --fit` does it."
    try:
        advice = advise(run.config, run.ranks, _last_step(read(run.path)), rates_of(run.config))
    except ConfigError as error:
        return f"It can't tell: {error}."
    return " ".join([*advice.sentences(), f"This run used {run.config.parallel.scheme}."])


def _last_step(trace: Trace) -> Trace:
    """Choices change while a router learns; the last ones are those to plan for."""
    last = max(step for step, _, _ in trace.records)
    return Trace(trace.info, {key: record for key, record in trace.records.items() if key[0] == last})
