"""All cases of `ops`."""

from __future__ import annotations

from twinmoe.testing.contract.case import Case
from twinmoe.testing.contract.element_cases import ELEMENTS, OPERATORS, SHAPES
from twinmoe.testing.contract.moe_cases import COMPUTE, ROUTERS, ROWS, SELECTING

CASES: list[Case] = [*OPERATORS, *SHAPES, *ELEMENTS, *SELECTING, *ROWS, *ROUTERS, *COMPUTE]
