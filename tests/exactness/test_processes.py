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


def test_cpu_equals_the_oracle_in_float32() -> None:
    verified("cpu", 2, "quick", "float32")


@pytest.mark.parametrize("world", [1, 2])
def test_mindspore_on_the_host_equals_the_oracle(world: int) -> None:
    verified("mindspore-cpu", world, "quick", "float64")
