"""How rows travel: the seam between a Plan and the collectives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ...backends.protocol import Array
from ..plan import Plan
from ..routing.base import Routing


@dataclass(frozen=True)
class Traffic:
    """Bytes that one all-to-all of dispatch moves, as planned: sent[r, s] from rank r to rank s of the group.

    rows: the same without ids and weights, which do not come back in combine; None: they are equal.
    """

    level: str
    sent: np.ndarray
    rows: np.ndarray | None = None

    @property
    def returned(self) -> np.ndarray:
        """Bytes of combine's all-to-all of this stage."""
        return (self.sent if self.rows is None else self.rows).T


@dataclass(frozen=True)
class Exchange:
    """What combine needs of dispatch. position_TK: row of each copy among the rows that come back, -1 = dropped.

    counts_C: rows per slot of this rank, on the device. traffic: the all-to-alls; tensor_bytes: what this rank sends
    inside its tensor group in dispatch and in combine. The other fields belong to the transport.
    """

    position_TK: Array
    counts_C: Array
    send_splits: tuple[int, ...] = ()
    recv_splits: tuple[int, ...] = ()
    to_slots: Array | None = None
    from_slots: Array | None = None
    traffic: tuple[Traffic, ...] = field(default=())
    tensor_bytes: tuple[int, int] | None = None
    extra: Any = None


class Transport(Protocol):
    """dispatch and combine: each one's gradient is the other."""

    def dispatch(self, x_TD: Array, routing: Routing, plan: Plan | None) -> tuple[Array, Exchange]:
        """(rows_ND in slot order on the computing rank, what combine needs)."""
        ...

    def combine(self, rows_ND: Array, weights_TK: Array, exchange: Exchange) -> Array:
        """y_TD: weighted sum of each token's rows, in the order of k."""
        ...


@runtime_checkable
class Overlapping(Transport, Protocol):
    """A transport whose exchanges may be under way while other work is done. `start` and `finish` make up the whole."""

    def dispatch_start(self, x_TD: Array, routing: Routing, plan: Plan) -> Any:
        """Rows leave."""
        ...

    def dispatch_finish(self, started: Any) -> tuple[Array, Exchange]:
        """What `dispatch` returns, once it is here."""
        ...

    def combine_start(self, rows_ND: Array, exchange: Exchange) -> Any:
        """Results leave."""
        ...

    def combine_finish(self, started: Any, weights_TK: Array, exchange: Exchange) -> Array:
        """What `combine` returns, once they are back."""
        ...
