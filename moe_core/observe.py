"""What a step did, as numbers: every rank's part goes through one gather and comes out as a record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..backends.protocol import Communicator, Group, Ops
from .layer import LayerStats
from .model import StepOutput


@dataclass
class StepTotals:
    """Sums over a rank's micro-batches of one step, on the host. node_R: node of each rank of the expert group."""

    node_R: np.ndarray | None = None

    scalars: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    chosen_LE: np.ndarray | None = None
    kept_LE: np.ndarray | None = None

    def add(self, ops: Ops, output: StepOutput, index: int) -> None:
        """Add one micro-batch. `index`: this rank's place in its expert group."""
        self.scalars["cross_entropy"] += float(ops.to_numpy(output.cross_entropy))
        for name, value in output.losses.items():
            self.scalars[f"loss/{name}"] += float(ops.to_numpy(value))
        if not output.stats:
            return
        chosen = np.stack([ops.to_numpy(s.chosen_E) for s in output.stats]).astype(np.float64)
        kept = np.stack([ops.to_numpy(s.kept_E) for s in output.stats]).astype(np.float64)
        self.chosen_LE = chosen if self.chosen_LE is None else self.chosen_LE + chosen
        self.kept_LE = kept if self.kept_LE is None else self.kept_LE + kept
        for stats, kept_E in zip(output.stats, kept):
            self._add_rows(stats, float(kept_E.sum()), index)

    def _add_rows(self, stats: LayerStats, kept: float, index: int) -> None:
        self.scalars["rows/sent"] += kept
        if stats.exchange.tensor_bytes is not None:
            self.scalars["bytes/tensor"] += sum(stats.exchange.tensor_bytes)
        for level, sent in stats.bytes_sent.items():
            self.scalars[f"bytes/{level}"] += sent
        for name, value in stats.figures.items():
            self.scalars[f"plan/{name}"] += value
        if stats.plan is None:
            self.scalars["rows/computed"] += kept
            self.scalars["rows/local"] += kept
            return
        matrix = stats.plan.send_matrix()
        self.scalars["rows/computed"] += float(matrix[:, index].sum())
        self.scalars["rows/local"] += float(matrix[index, index])
        for traffic in stats.exchange.traffic:
            sent = traffic.sent[index] + traffic.returned[index]  # out in dispatch, back in combine
            self.scalars[f"bytes/{traffic.level}"] += float(sent.sum() - sent[index])
            if self.node_R is not None:
                self.scalars["between_nodes"] += float(sent[self.node_R != self.node_R[index]].sum())


@dataclass(frozen=True)
class StepSummary:
    """scalars: sums over ranks; rows_R: expert rows that each rank computed; chosen_LE, kept_LE over all ranks."""

    scalars: Mapping[str, float]
    rows_R: np.ndarray
    chosen_LE: np.ndarray
    kept_LE: np.ndarray
    flags: int


def gather_totals(
    totals: StepTotals, comm: Communicator, world: Group, shape: tuple[int, int], names: Sequence[str], flag: bool
) -> StepSummary:
    """One gather of one float64 vector a rank. `names`: the scalars, the same on every rank; flag: counted."""
    empty = np.zeros(shape)
    parts = [
        np.array([totals.scalars.get(name, 0.0) for name in names]),
        (totals.chosen_LE if totals.chosen_LE is not None else empty).reshape(-1),
        (totals.kept_LE if totals.kept_LE is not None else empty).reshape(-1),
        np.array([float(flag)]),
    ]
    all_ranks = comm.gather_to_host(np.concatenate(parts), world)
    sums = all_ranks.sum(0)
    size = int(np.prod(shape))
    n = len(names)
    scalars = dict(zip(names, sums[:n].tolist()))
    rows = all_ranks[:, list(names).index("rows/computed")]
    return StepSummary(
        scalars, rows, sums[n : n + size].reshape(shape), sums[n + size : n + 2 * size].reshape(shape), int(sums[-1])
    )


def load_record(summary: StepSummary) -> dict[str, object]:
    """Load and traffic of a step in the words of metrics.jsonl."""
    chosen, kept = summary.chosen_LE, summary.kept_LE
    sent = summary.scalars.get("rows/sent", 0.0)
    mean = np.maximum(chosen.mean(1), 1e-30) if chosen.size else np.ones(0)
    record: dict[str, object] = {
        "expert_load": kept.astype(int).tolist(),
        "rows_per_rank": summary.rows_R.astype(int).tolist(),
        "expert_imbalance": float((chosen.max(1) / mean).mean()) if chosen.size else 1.0,
        "rank_imbalance": float(summary.rows_R.max() / max(summary.rows_R.mean(), 1e-30)),
        "local_share": summary.scalars.get("rows/local", 0.0) / sent if sent else 1.0,
        "drop_rate": 1.0 - float(kept.sum() / max(chosen.sum(), 1.0)),
        "dead_experts": int((chosen == 0).sum()),
    }
    record["bytes_between_nodes"] = summary.scalars.get("between_nodes", 0.0)
    record["bytes"] = {k.split("/", 1)[1]: v for k, v in summary.scalars.items() if k.startswith("bytes/")}
    ranks = max(1, len(summary.rows_R))  # sums over layers and micro-batches, the mean of ranks
    record["plan"] = {k.split("/", 1)[1]: v / ranks for k, v in summary.scalars.items() if k.startswith("plan/")}
    return record
