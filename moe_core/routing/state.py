"""What routers learn without gradients: the balancing bias and the angle behind the capacity, as host arrays.

The training loop holds them, sums the statistics of a step over micro-batches and ranks, and calls `updated` once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..config import MoeConfig
from .base import State
from .capacity import NO_DELTA
from .theory import cosine_edges, low_quantile

CHOSEN, KEPT, COSINES = "chosen_E", "kept_E", "cosine_counts"
"""Statistics: choices and kept copies of each expert; tokens whose cosine reaches each of `cosine_edges`."""


def initial(moe: MoeConfig) -> dict[str, np.ndarray]:
    """State before the first step: no bias, no angle."""
    state: dict[str, np.ndarray] = {}
    if moe.bias_update_rate:
        state["bias"] = np.zeros(moe.num_experts)
    if moe.capacity_rule != "factor":
        state["delta"] = np.array([NO_DELTA])
    return state


def updated(moe: MoeConfig, width: int, state: State, totals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """State after an optimizer step, from its statistics over all micro-batches and ranks. Deterministic."""
    new = {name: np.asarray(value) for name, value in state.items()}
    if "bias" in new:
        new["bias"] = new["bias"] + bias_step(totals[CHOSEN], moe.bias_update_rate, moe.bias_update_rule)
    if "delta" in new and (moe.capacity_rule == "angle_step" or new["delta"][0] == NO_DELTA) and totals[COSINES][0]:
        new["delta"] = np.array([low_quantile(totals[COSINES], cosine_edges(width), moe.capacity_quantile)])
    return new


def bias_step(chosen_E: np.ndarray, rate: float, rule: str) -> np.ndarray:
    """rate x (s - mean(s)); s = sign(mean load - load) (DeepSeek-V3, mean-centred), or 1 - load/mean load.

    Exact integers decide the sign, so that every rank finds the same bias.
    """
    counts = np.rint(np.asarray(chosen_E)).astype(np.int64)
    total, num_experts = int(counts.sum()), len(counts)
    if total == 0:
        return np.zeros(num_experts)
    gap = total - counts * num_experts
    s = np.sign(gap).astype(np.float64) if rule == "sign" else gap / total
    return rate * (s - s.mean())
