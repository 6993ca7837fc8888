"""Every transport over the collectives of real processes, on each framework."""

from __future__ import annotations

import pytest
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.processes import run_processes

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(("backend", "ranks_per_node"), [("cpu", 4), ("cpu", 2), ("mindspore-cpu", 4)])
def test_layers_equal_the_oracle(backend: str, ranks_per_node: int):
    """With two ranks a node, gloo's exchanges between nodes are sends and receives."""
    load_or_skip(backend)
    arguments = {"dtype": "float64", "ranks_per_node": ranks_per_node}
    found = run_processes(4, "twinmoe.testing.moe_core.transport.process_cases:run", arguments, backend)
    for name, (worst, where, zeros_ok) in found.items():
        assert worst <= 1e-10, f"{name}: {where}"
        assert zeros_ok, name


def test_bfloat16_rows_with_float32_weights_stay_within_rounding():
    found = run_processes(2, "twinmoe.testing.moe_core.transport.process_cases:narrow_rows", {})
    y, d_x, d_weights = found["distances"]
    assert max(y, d_x) < 2**-7
    assert d_weights < 2**-7


def test_bytes_of_an_exchange_are_those_in_the_log_of_calls():
    found = run_processes(4, "twinmoe.testing.moe_core.transport.process_cases:traffic", {})
    assert {name for name, (planned, _) in found.items() if planned[1]} == {"tensor", "groupwise"}
    for name, (planned, moved) in found.items():
        assert planned == moved, name
        assert planned[0] > 0, name
