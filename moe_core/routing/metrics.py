"""What a step's router statistics mean, as numbers for a record."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..config import MoeConfig
from .locality import NODE_ROWS, local_share, uniform_local_share
from .state import CHOSEN, KEPT


def router_metrics(moe: MoeConfig, totals: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of one layer: load_max_over_mean (choices), drop_rate, and with nodes local_share beside its uniform baseline."""
    chosen, kept = np.asarray(totals[CHOSEN], np.float64), np.asarray(totals[KEPT], np.float64)
    found = {
        "load_max_over_mean": float(chosen.max() / max(chosen.mean(), 1e-30)),
        "drop_rate": float(1 - kept.sum() / max(chosen.sum(), 1)),
    }
    if NODE_ROWS in totals:
        rows_RR = np.asarray(totals[NODE_ROWS], np.float64).reshape(moe.locality_nodes, -1)
        found["local_share"] = local_share(totals)
        found["local_share_uniform"] = uniform_local_share(moe, rows_RR.sum(1))
    return found
