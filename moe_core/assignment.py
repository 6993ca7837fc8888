"""Which rank takes which sequences of a global batch: a permutation, so the global loss stays what it is.

Every function returns order_S: rank r of R takes the sequences order[r * S/R : (r + 1) * S/R], ascending. Integers
throughout, so that all ranks find the same order from the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.optimize import linear_sum_assignment

from .data import GlobalBatch

ONE = 1 << 16
"""What one routed copy adds to the table (fixed point)."""
_SCALE = 1 << 20


@dataclass(frozen=True, eq=False)
class Homes:
    """Where experts and sequences live: expert_E and rank_R give a home (a rank or a node, from 0) for each.

    Experts of several layers are laid end to end in E.
    """

    expert_E: np.ndarray
    rank_R: np.ndarray

    @property
    def number(self) -> int:
        return int(max(self.expert_E.max(initial=-1), self.rank_R.max(initial=-1))) + 1


class AffinityTable:
    """How often each token id went to each expert lately: V x E integers, on the host of every rank.

    update: table <- decay * table + ONE * counts, rounded down. The same on all ranks if the counts are those of
    all ranks (`pair_counts` summed over them). decay is a rational such as '0.98'; ValueError unless 0 < decay <= 1.
    """

    def __init__(self, num_tokens: int, num_experts: int, decay: Fraction | str = "0.98") -> None:
        self.decay = Fraction(decay)
        if not 0 < self.decay <= 1:
            raise ValueError(f"the affinity table's decay={decay} must lie in (0, 1]; take '0.98'")
        self.table_VE = np.zeros((num_tokens, num_experts), np.int64)

    def update(self, counts_VE: np.ndarray) -> None:
        """Take in the routing of one step: copies per (token id, expert)."""
        if counts_VE.shape != self.table_VE.shape:
            raise ValueError(f"counts of shape {counts_VE.shape} do not fit the table's {self.table_VE.shape}")
        self.table_VE = self.table_VE * self.decay.numerator // self.decay.denominator + ONE * counts_VE.astype(
            np.int64
        )

    def expected_local_rows(self, tokens_SL: np.ndarray, real_SL: np.ndarray, homes: Homes) -> np.ndarray:
        """(S, H) int64: for each home, the rows of a sequence that stay if it lives there, in 1 / 2^20 of all its rows.

        A token is expected to spread as it did lately, an unseen one as all tokens did.
        """
        ids_U, place = np.unique(tokens_SL, return_inverse=True)
        spread_E = self.table_VE.sum(0)
        rows_UE = self.table_VE[ids_U]
        rows_UE[~rows_UE.any(1)] = spread_E if spread_E.any() else 1
        by_home_UH = np.zeros((homes.number, len(ids_U)), np.int64)
        np.add.at(by_home_UH, homes.expert_E, rows_UE.T)
        share_UH = (by_home_UH.astype(np.float64) / rows_UE.sum(1) * _SCALE).astype(np.int64).T
        chosen = share_UH[place.reshape(tokens_SL.shape)]
        return np.where(real_SL[..., None], chosen, 0).sum(1)

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        return {"affinity_table": self.table_VE}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take a checkpoint's arrays back. ValueError when they are of another vocabulary or model."""
        table = np.asarray(state["affinity_table"], np.int64)
        if table.shape != self.table_VE.shape:
            raise ValueError(
                f"the checkpoint's affinity table is {table.shape}, this model's {self.table_VE.shape}; "
                "resume with the model it was saved with, or with parallel.data_assignment=by_domain"
            )
        self.table_VE = table.copy()


def pair_counts(tokens_T: np.ndarray, ids_TK: np.ndarray, num_tokens: int, num_experts: int) -> np.ndarray:
    """(V, E) int64 copies per (token id, expert) of this rank's real tokens; ids below 0 (dropped) do not count."""
    keys = np.broadcast_to(tokens_T[:, None] * num_experts, ids_TK.shape) + ids_TK
    counts = np.bincount(keys[ids_TK >= 0], minlength=num_tokens * num_experts)
    return counts.reshape(num_tokens, num_experts)


def round_robin(domain_S: np.ndarray, ranks: int) -> np.ndarray:
    """Deal the sequences out in turn, domain by domain: every rank gets its part of each."""
    _share(len(domain_S), ranks)
    dealt = np.argsort(domain_S, kind="stable").reshape(-1, ranks).T
    return np.sort(dealt, axis=1).reshape(-1)


def by_domain(domain_S: np.ndarray, ranks: int) -> np.ndarray:
    """Neighbouring ranks take the same domain: the batch, sorted by domain, is cut into equal shares."""
    share = _share(len(domain_S), ranks)
    sorted_by_domain = np.argsort(domain_S, kind="stable").reshape(ranks, share)
    return np.sort(sorted_by_domain, axis=1).reshape(-1)


def by_affinity(local_SH: np.ndarray, rank_R: np.ndarray) -> np.ndarray:
    """The order that keeps most rows local, at equal shares: a transport problem, solved as an assignment.

    local_SH: rows that stay if a sequence lives at a home; rank_R: the home of each rank.
    """
    ranks = len(rank_R)
    share = _share(len(local_SH), ranks)
    seats = np.repeat(rank_R, share)
    _, seat_S = linear_sum_assignment(local_SH[:, seats], maximize=True)
    return np.lexsort((np.arange(len(seat_S)), seat_S // share))


def assign(mode: str, batch: GlobalBatch, homes: Homes, table: AffinityTable | None = None) -> GlobalBatch:
    """The batch in the order of `parallel.data_assignment`; then `batch.for_rank`. Without a table (or with an
    empty one) by_affinity deals in turn: it has seen nothing yet. ValueError if ranks do not divide the sequences.
    """
    ranks = len(homes.rank_R)
    if mode == "by_domain":
        order = by_domain(batch.domain_S, ranks)
    elif mode == "by_affinity" and table is not None and table.table_VE.any():
        local_SH = table.expected_local_rows(batch.tokens_SL, batch.real_SL, homes)
        order = by_affinity(local_SH, homes.rank_R)
    elif mode in ("round_robin", "by_affinity"):
        order = round_robin(batch.domain_S, ranks)
    else:
        raise ValueError(f"parallel.data_assignment={mode!r} is unknown; choose round_robin, by_domain or by_affinity")
    return batch.take(order)


def _share(sequences: int, ranks: int) -> int:
    if sequences % ranks:
        raise ValueError(
            f"train.global_batch_size={sequences} sequences cannot be shared equally by {ranks} ranks; "
            f"set it to a multiple of {ranks}, or use fewer ranks"
        )
    return sequences // ranks
