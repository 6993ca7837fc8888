"""Weights fetched one layer ahead (`parallel.prefetch_layers: 1`): the unshard of layer L + 1 sets out right after
layer L's rows, so that it travels under L's experts, and is waited for before the first product of L + 1.

Backward runs the same in reverse: the reshard of L + 1's gradients sets out when they are there and is waited for after
L's expert backward. Every rank issues the same calls in the same order: only what all ranks know decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.protocol import Array
from .plan import Plan
from .residency.fully_sharded import FullySharded
from .routing.base import Memo

if TYPE_CHECKING:
    from .layer import MoELayer


@dataclass(frozen=True)
class UnderWay:
    """Weights on their way to the slots (R, C) of a call that is still to come."""

    slots_RC: np.ndarray
    weights: Any


def link(memos: Sequence[Memo], modules: Sequence[Callable[..., Any]], inputs: Any) -> None:
    """Each of these MoE layers, in order, sets out the weights of the one after it: `module(None, inputs, memo)`."""
    for before, after, module in zip(memos, memos[1:], modules[1:]):
        before.ahead = partial(module, None, inputs, after)


def set_out(layer: MoELayer, params: Mapping[str, Array], memo: Memo) -> None:
    """Begin this layer's unshard before its call, where its slots are known before its counts."""
    slots_RC = layer.planner.coming()
    if layer.group.size > 1 and slots_RC is not None and isinstance(layer.residency, FullySharded):
        memo.under_way = UnderWay(slots_RC, layer.residency.gather_slots(params, slots_RC))


def taken(layer: MoELayer, params: Mapping[str, Array], plan: Plan | None, memo: Memo) -> Any:
    """The weights under way, else those that set out now. RuntimeError if they are for other slots than the plan's."""
    under_way, memo.under_way = memo.under_way, None
    if under_way is None:
        return layer.residency.gather(params, plan)
    if plan is None or not np.array_equal(plan.slots, under_way.slots_RC):
        raise RuntimeError(
            "the plan uses other slots than its planner announced, so weights fetched ahead are of other experts; "
            "set parallel.prefetch_layers=0 and report the planner"
        )
    return under_way.weights


def land(layer: MoELayer, memo: Memo) -> None:
    """Wait for weights that nobody will use: every rank has issued their exchange and none leaves it pending."""
    under_way, memo.under_way = memo.under_way, None
    if under_way is not None:
        layer.residency.arrived(under_way.weights)
