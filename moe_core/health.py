"""What tells early that a run goes wrong: norms of parts, load, entropy, drops; and the rules by which it is said."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from ..backends.protocol import Communicator, Group, Parameter

PARTS: tuple[str, ...] = ("router", "experts", "attention", "vocabulary", "other")
DEAD_AFTER = 50
"""Steps in a row without a token after which an expert is called dead."""
REPEAT = 500
"""Steps after which a warning that still holds is said again."""

Record = Mapping[str, Any]


def part_of(name: str, parameter: Parameter) -> str:
    """Which of PARTS a parameter belongs to."""
    if name.endswith("w_router"):
        return "router"
    if parameter.pieces:
        return "experts"
    if ".attention." in name:
        return "attention"
    return "vocabulary" if name.startswith("vocabulary.") else "other"


def gradient_norms(
    gradients: Mapping[str, np.ndarray],
    parameters: Mapping[str, Parameter],
    groups: Mapping[str, Group],
    comm: Communicator,
) -> dict[str, float]:
    """Norm of each part of the reduced gradients, over all ranks, every element once. One gather.

    The squares add up to that of the global norm before clipping.
    """
    squares = dict.fromkeys(PARTS, 0.0)
    for name, gradient in gradients.items():
        parameter = parameters[name]
        if groups[parameter.reduce_over].index == 0:  # the ranks of that group hold the same
            squares[part_of(name, parameter)] += float(np.square(gradient, dtype=np.float64).sum())
    everyone = comm.gather_to_host(np.array([squares[part] for part in PARTS]), groups["world"])
    return dict(zip(PARTS, np.sqrt(everyone.sum(0)).tolist()))


def load_figures(chosen_LE: np.ndarray) -> dict[str, Any]:
    """Of choices before dropping: percentiles of the experts' load over its mean, and the entropy of their shares.

    Both per layer, then the mean over layers (`min`: the smallest); entropy 1 = even, 0 = one expert takes all.
    """
    totals = chosen_LE.sum(1)
    if not chosen_LE.size or not totals.all():
        return {}
    share_LE = chosen_LE / totals[:, None]
    load_LE = share_LE * chosen_LE.shape[1]
    percentiles = np.percentile(load_LE, (5, 50, 95), axis=1).mean(1)
    logs = np.log(np.where(share_LE > 0, share_LE, 1.0))
    entropy_L = -(share_LE * logs).sum(1) / max(np.log(chosen_LE.shape[1]), 1e-30)
    return {
        "load_percentiles": dict(zip(("p5", "p50", "p95"), percentiles.tolist())),
        "router_entropy": {"mean": float(entropy_L.mean()), "min": float(entropy_L.min())},
    }


@dataclass(frozen=True)
class Rule:
    """Warn when a figure of the record is beyond `limit` for `steps` steps in a row. told: with {value}, {limit}."""

    figure: Callable[[Record], float | None]
    limit: float
    steps: int
    told: str
    above: bool = True

    def broken(self, record: Record) -> float | None:
        """The figure, if it is beyond the limit."""
        value = self.figure(record)
        if value is None:
            return None
        return value if (value > self.limit if self.above else value < self.limit) else None


def _inside(*path: str) -> Callable[[Record], float | None]:
    def figure(record: Record) -> float | None:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return figure


RULES: Mapping[str, Rule] = {
    "load": Rule(
        _inside("load_percentiles", "p95"),
        4.0,
        20,
        "the busiest experts (95th percentile) take {value:.1f} times the mean load; raise moe.aux_loss_coeff or set "
        "moe.bias_update_rate",
    ),
    "drops": Rule(
        _inside("drop_rate"),
        0.1,
        20,
        "{value:.0%} of the choices are dropped; raise moe.capacity_factor, or set it to null",
    ),
    "entropy": Rule(
        _inside("router_entropy", "min"),
        0.5,
        20,
        "a router has collapsed on few experts (entropy of shares {value:.2f} of 1); raise moe.aux_loss_coeff",
        above=False,
    ),
    "ranks": Rule(
        _inside("rank_imbalance"),
        3.0,
        20,
        "the busiest rank computes {value:.1f} times the mean; parallel.scheme=llep or hiermoe shares it out",
    ),
    "router_gradient": Rule(
        lambda r: r["grad_norms"]["router"] if r.get("grad_norms", {}).get("experts") else None,
        1e-30,
        1,
        "routers get no gradient; see moe.norm_topk_prob and moe.top_k",
        above=False,
    ),
}


@dataclass
class Health:
    """What was seen of a run so far. The same on every rank; not part of checkpoints."""

    moe_layers: tuple[int, ...]
    every: int
    _idle_LE: np.ndarray | None = None
    _broken_for: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _norms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def wants_norms(self, step: int) -> bool:
        """Whether gradients of this step (from 0) are measured by part: they are copied to the host."""
        return bool(self.every) and step % self.every == 0

    def warnings(self, record: Record, chosen_LE: np.ndarray) -> list[str]:
        """Sentences about the step just made."""
        found = self._dead(chosen_LE) + self._jumps(record.get("grad_norms", {}))
        for name, rule in RULES.items():
            value = rule.broken(record)
            if value is None:
                if rule.figure(record) is not None:
                    self._broken_for[name] = 0
                continue
            self._broken_for[name] += 1
            if self._due(self._broken_for[name], rule.steps):
                found.append(rule.told.format(value=value, limit=rule.limit))
        return [f"step {record['step']}: {sentence}" for sentence in found]

    def _dead(self, chosen_LE: np.ndarray) -> list[str]:
        before = np.zeros(chosen_LE.shape, np.int64) if self._idle_LE is None else self._idle_LE
        self._idle_LE = np.where(chosen_LE == 0, before + 1, 0)
        found = []
        for layer, idle_E in zip(self.moe_layers, self._idle_LE):
            dead = np.flatnonzero([self._due(int(n), DEAD_AFTER) for n in idle_E])
            if len(dead):
                named = ", ".join(map(str, dead[:8])) + (" ..." if len(dead) > 8 else "")
                found.append(f"layer {layer}: no token chose expert {named} for {DEAD_AFTER} steps or more")
        return found

    def _jumps(self, norms: Mapping[str, float]) -> list[str]:
        """Parts whose gradient norm is ten times the median of its last ten."""
        found = []
        for part, norm in norms.items():
            seen = self._norms[part]
            if len(seen) >= 5 and norm > 10 * median(seen) > 0:
                found.append(f"the gradient norm of {part} is {norm:.3g}, ten times what it was ({median(seen):.3g})")
            self._norms[part] = [*seen, norm][-10:]
        return found

    @staticmethod
    def _due(count: int, first: int) -> bool:
        return count == first or (count > first and (count - first) % REPEAT == 0)
