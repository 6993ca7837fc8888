"""Which weights are where when rows arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ...backends.protocol import Array, Parameter
from ..plan import Plan
from ..transport.base import Exchange


class Residency(Protocol):
    """The expert weights of a rank: their storage and their use."""

    def parameters(self, prefix: str, std_down: float) -> tuple[Parameter, ...]:
        """What this rank stores, named `prefix` + 'w_up' and so on."""
        ...

    def compute(self, params: Mapping[str, Array], rows_ND: Array, exchange: Exchange, plan: Plan | None) -> Array:
        """out_ND: rows, in slot order, through their slot's expert."""
        ...
