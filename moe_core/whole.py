"""A rank that has all experts, on a backend that goes from tokens to weighted outputs in one operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..backends.protocol import Array, Ops
from .config import MoeConfig, ParallelConfig
from .routing.base import Routing
from .transport.base import Exchange


@dataclass(frozen=True)
class Whole:
    """Dispatch, compute and combine where nothing travels.

    routed(x_TD, ids_TK, weights_TK, w_up, w_down): y_TD, or None for shapes and dtypes it does not take.
    """

    ops: Ops
    routed: Callable[..., Array | None]
    num_experts: int

    def __call__(self, params: Mapping[str, Array], x_TD: Array, routing: Routing) -> tuple[Array, Exchange] | None:
        ids_TK = routing.ids_TK
        y_TD = self.routed(x_TD, ids_TK, routing.weights_TK, params["w_up"], params["w_down"])
        return None if y_TD is None else (y_TD, Exchange(ids_TK, self.ops.count(ids_TK, self.num_experts)))


def whole_layer(moe: MoeConfig, parallel: ParallelConfig, ops: Ops, ranks: int) -> Whole | None:
    """`Whole` for a layer on so many ranks (expert and tensor), if its backend has `routed_mlp`; else None."""
    routed = getattr(ops, "routed_mlp", None)  # not part of the contract: kernels that few backends have
    owned = parallel.residency == "owned" and parallel.max_rows_per_rank is None
    plain = moe.activation in ("swiglu", "gelu") and not moe.expert_bias
    return Whole(ops, routed, moe.num_experts) if routed and ranks == 1 and owned and plain else None
