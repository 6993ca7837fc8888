"""Which weights are where when rows arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ...backends.protocol import Array, Parameter
from ..plan import Plan
from ..transport.base import Exchange


class Residency(Protocol):
    """The expert weights of a rank: their storage and their use."""

    def parameters(self, prefix: str, std_down: float) -> tuple[Parameter, ...]:
        """What this rank stores, named `prefix` + 'w_up' and so on."""
        ...

    def gather(self, params: Mapping[str, Array], plan: Plan | None) -> Any:
        """Begin to bring here the weights that this call's plan wants; `compute` waits for those that it needs."""
        ...

    def arrived(self, weights: Any) -> Any:
        """The same with all weights here, to serve several rounds of rows."""
        ...

    def compute(self, weights: Any, rows_ND: Array, exchange: Exchange, plan: Plan | None) -> Array:
        """out_ND: rows, in slot order, through their slot's expert. weights: from `gather` or `arrived`."""
        ...
