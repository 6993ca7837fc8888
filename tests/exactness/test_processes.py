"""The same cases in real processes over real collectives."""

from __future__ import annotations

import pytest
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.processes import run_processes

pytestmark = pytest.mark.processes


def verified(backend: str, world: int, level: str, dtype: str) -> None:
    load_or_skip(backend)
    result = run_processes(world, "twinmoe.moe_core.verify:run", {"level": level, "dtype": dtype}, backend)
    assert result["failures"] == []
    assert result["passed"] == result["cases"] > 0


@pytest.mark.parametrize("world", [2, 4])
def test_cpu_equals_the_oracle_in_float64(world: int) -> None:
    verified("cpu", world, "standard", "float64")


@pytest.mark.parametrize(("world", "level"), [(1, "standard"), (2, "quick")])
def test_cpu_equals_the_oracle_in_float32(world: int, level: str) -> None:
    """Heads, whose right answer comes from the reference, take AdamW's epsilon of float32 as the others do."""
    verified("cpu", world, level, "float32")


@pytest.mark.parametrize("world", [1, 2])
def test_mindspore_on_the_host_equals_the_oracle(world: int) -> None:
    verified("mindspore-cpu", world, "quick", "float64")
