"""Digests: one bit anywhere tells two computations apart, and `verify --deterministic` says which case it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.moe_core import verify_request
from twinmoe.moe_core.bits import differing, digest_of, digests_of_all
from twinmoe.moe_core.exactness import StepResult
from twinmoe.moe_core.verify_request import VerifyRequest, lines, verify

STEP = StepResult({0: np.ones(3)}, {"w": np.array([0.0, 1.5])}, {}, {"z": 0.25}, 2.0, {"w": np.ones((2, 2))})


def next_to(x: float) -> float:
    return float(np.nextafter(x, 9))


@pytest.mark.parametrize(
    "changed",
    [
        {"y": {0: np.array([1.0, next_to(1.0), 1.0])}},
        {"y": {1: np.ones(3)}},
        {"grads": {"w": np.array([-0.0, 1.5])}},
        {"grads": {"w": np.array([0.0, 1.5], np.float32)}},
        {"losses": {"z": next_to(0.25)}},
        {"norm": next_to(2.0)},
        {"params": {"w": np.ones(4)}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_one_bit_makes_another_digest(changed: dict[str, Any]) -> None:
    assert digest_of([STEP]) == digest_of([replace(STEP)])
    assert digest_of([STEP]) != digest_of([replace(STEP, **changed)])
    assert digest_of([STEP]) != digest_of([STEP, STEP])


def test_a_bit_of_any_rank_is_in_everybodys_digest() -> None:
    def told(changed: int) -> list[list[str]]:
        def rank(comm: Any) -> list[str]:
            norm = next_to(2.0) if comm.rank == changed else 2.0
            mine = [digest_of([replace(STEP, norm=norm)]), digest_of([STEP])]
            return digests_of_all(mine, comm, comm.group("world", [[0, 1, 2]]))

        return run_ranks(3, rank)

    plain, changed = told(-1), told(2)
    assert plain == plain[:1] * 3
    assert changed[0][0] != plain[0][0]
    assert changed[0][1] == plain[0][1]


def test_runs_of_other_cases_differ() -> None:
    assert differing([["a", "1"], ["b", "2"]], [["a", "1"], ["b", "3"]]) == ["b"]
    assert differing([["a", "1"]], [["c", "1"]]) == ["the two runs did not compute the same cases"]


def test_verify_names_the_case_whose_bits_change(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter(["1", "1", "2", "1"])  # worlds 2 and 4, then each once more

    def run(backend: str, decided_by: str, ranks: int, options: Any) -> dict[str, Any]:
        part = {"cases": 1, "passed": 1, "failed": 0, "failures": [], "worst_relative_error": 0.0, "axes": {}}
        return {**part, "world_sizes": [ranks], "backends": [backend], "bits": [["one case", next(runs)]]}

    monkeypatch.setattr(verify_request, "_run", run)
    report = verify(VerifyRequest(backends=("cpu",), deterministic=True))
    assert report["differing"] == ["cpu, world 2: one case"]
    assert lines(report)[1:] == [
        "cpu, world 2: one case: a second run gave other bits",
        "1 of 2 cases gave the same bits twice",
    ]
