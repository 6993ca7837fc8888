"""Every legal way of running a layer, on virtual ranks of the NumPy reference, equals the dense oracle."""

from __future__ import annotations

import pytest
from twinmoe.backends import reference
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.moe_core.verify import verify_rank

WORLDS = (1, 2, 3, 4, 8)


def verified(world: int, level: str) -> dict:
    result = run_ranks(world, lambda comm: verify_rank(reference, comm, level, "float64"), timeout_s=1800)[0]  # type: ignore[arg-type]
    assert result["failures"] == []
    assert result["passed"] == result["cases"] > 0
    return result


@pytest.mark.parametrize("world", WORLDS)
def test_schemes_routings_and_every_pair_of_options_equal_the_oracle(world: int) -> None:
    result = verified(world, "standard")
    assert result["worst_relative_error"] <= 1e-10
    assert set(result["axes"]["routing"]) >= {"same_experts", "ties", "idle_rank", "uneven", "padding_only"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_full_product_equals_the_oracle(world: int) -> None:
    verified(world, "full")
