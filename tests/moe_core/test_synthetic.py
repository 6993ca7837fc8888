"""Synthetic choices have the skew that they name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from twinmoe.backends.protocol import Parameter
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.synthetic import Skew, choose, quick_values

TOKENS, EXPERTS = 4000, 16


def shares(ids: np.ndarray, num_experts: int = EXPERTS) -> np.ndarray:
    return np.bincount(ids.reshape(-1), minlength=num_experts) / ids.size


@pytest.mark.parametrize(
    "text", ["balanced", "hot:75:4", "hot:30:2", "hot:100:4", "zipf:1.2", "groups:4:2", "together:2"]
)
def test_ids_of_a_token_are_distinct_and_the_same_seed_gives_the_same(text: str):
    ids = choose(Skew.parse(text), EXPERTS, 200, 4, seed=1)
    assert ids.shape == (200, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert ids.min() >= 0
    assert ids.max() < EXPERTS
    np.testing.assert_array_equal(ids, choose(Skew.parse(text), EXPERTS, 200, 4, seed=1))


def test_a_hot_share_is_met_exactly():
    ids = choose(Skew.parse("hot:30:2"), EXPERTS, TOKENS, 4, seed=0)
    assert (ids < 2).sum() == 0.3 * ids.size
    assert shares(ids)[2:] == pytest.approx(0.7 / 14, rel=0.15)


def test_balanced_and_zipf_shares():
    assert shares(choose(Skew.parse("balanced"), EXPERTS, TOKENS, 2, 0)) == pytest.approx(1 / EXPERTS, rel=0.15)
    ordered = np.sort(shares(choose(Skew.parse("zipf:1"), EXPERTS, TOKENS, 1, 0)))[::-1]
    exact = 1 / np.arange(1, EXPERTS + 1)
    assert ordered == pytest.approx(exact / exact.sum(), rel=0.3)


def test_tokens_stay_inside_their_groups():
    ids = choose(Skew.parse("groups:4:2"), EXPERTS, 500, 4, 0)
    assert max(len(set(row)) for row in (ids // 4).tolist()) == 2


def test_experts_of_a_set_are_chosen_together():
    ids = choose(Skew.parse("together:4"), EXPERTS, 200, 4, 0)
    assert all(sorted(row) == [row_min + 4 * i for i in range(4)] for row, row_min in zip(ids.tolist(), ids.min(1)))
    assert shares(ids) == pytest.approx(1 / EXPERTS, rel=0.4)


def test_repeated_ids_are_marked_and_follow_counts(tmp_path: Path):
    file = tmp_path / "counts.json"
    file.write_text(json.dumps([[3, 0], [0, 1]]))
    skew = Skew.parse(f"counts:{file}", repeat_ids=True)
    assert "repeated ids" in skew.text
    assert shares(choose(skew, 2, TOKENS, 2, 0), 2) == pytest.approx([0.75, 0.25], abs=0.02)
    hot = choose(Skew.parse("hot:95:1", repeat_ids=True), EXPERTS, TOKENS, 4, 0)
    assert shares(hot)[0] == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hot:95:3", "between 4 and"),
        ("hot:10:14", "hot experts"),
        ("hot:120:4", "do not exist"),
        ("groups:5:2", "choose divisors"),
        ("groups:8:1", "fewer than 4"),
        ("together:3", "divides"),
        ("skewed", "choose balanced"),
        ("zipf:x", "choose balanced"),
        ("counts:nowhere.json", "can't be read"),
    ],
)
def test_impossible_skews_are_refused(text: str, told: str):
    with pytest.raises(ConfigError, match=told):
        choose(Skew.parse(text), EXPERTS, 10, 4, 0)


def test_quick_values_are_small_distinct_and_the_same_each_time() -> None:
    parameter = Parameter("w", (40, 50), lambda: np.ones((40, 50)))
    (quick,) = quick_values([parameter], seed=3)
    first = quick.initial()
    assert first.shape == (40, 50)
    assert first.dtype == np.float32
    assert np.abs(first).max() <= 0.035
    assert len(np.unique(first)) > 1900
    assert np.array_equal(first, quick.initial())
