"""Published skews: straggler ratios to two digits, transfers, and what each plan makes of them."""

from fractions import Fraction

import numpy as np
import pytest
from twinmoe.moe_core.planners.least_loaded import LeastLoadedOptions, plan_least_loaded
from twinmoe.moe_core.planners.rationals import imbalance
from twinmoe.moe_core.planners.skew import (
    DEEPSEEK_V3,
    GPT_OSS_120B,
    Skew,
    SkewRun,
    balanced,
    skew_table,
    skewed_counts,
)
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table

PERCENTS = (30, 50, 80, 95)
RATIOS = [
    (GPT_OSS_120B, 1, ("3.06", "4.47", "6.59", "7.65")),
    (GPT_OSS_120B, 4, ("2.94", "4.39", "6.55", "7.64")),
    (GPT_OSS_120B, 16, ("2.40", "4.00", "6.40", "7.60")),
    (DEEPSEEK_V3, 1, ("3.08", "4.49", "6.60", "7.65")),
]
CASES = [(shape, hot, p, ratio) for shape, hot, ratios in RATIOS for p, ratio in zip(PERCENTS, ratios)]


def counts_of(shape, hot: int, percent: int) -> np.ndarray:
    copies = 32768 * 4
    return skewed_counts(Skew(Fraction(percent, 100), hot), shape.num_experts, 8, copies)


@pytest.mark.parametrize(("shape", "hot", "percent", "ratio"), CASES)
def test_straggler_ratios(shape, hot, percent, ratio):
    counts = counts_of(shape, hot, percent)
    table = slot_table(owners(shape.num_experts, 8), 8)
    measured = float(imbalance(plan_static(counts, table).rows_per_rank()))
    assert abs(measured - float(ratio)) < 0.0101
    p, experts, share = percent / 100, shape.num_experts, shape.num_experts // 8
    assert measured == pytest.approx(8 * (p + (1 - p) * (share - hot) / (experts - hot)), rel=1e-3)
    plan = plan_least_loaded(counts, table, LeastLoadedOptions())
    assert imbalance(plan.rows_per_rank()) < Fraction(1001, 1000)


@pytest.mark.parametrize(
    ("shape", "hot", "transfers"),
    [
        (GPT_OSS_120B, 1, (7, 7, 7, 7)),
        (GPT_OSS_120B, 4, (10, 10, 10, 10)),
        (GPT_OSS_120B, 16, (16, 18, 20, 20)),
        (DEEPSEEK_V3, 1, (7, 7, 7, 7)),
    ],
)
def test_transfers_of_the_published_cases(shape, hot, transfers):
    table = slot_table(owners(shape.num_experts, 8), 8)
    options = LeastLoadedOptions(small_remainder="pseudocode")
    made = [
        int((plan_least_loaded(counts_of(shape, hot, percent), table, options).weight_from >= 0).sum())
        for percent in PERCENTS
    ]
    assert made == list(transfers)


def test_counts_are_exact_and_even():
    counts = skewed_counts(Skew(Fraction(1, 3), 3), 8, 4, 100)
    assert counts.sum(1).tolist() == [100] * 4
    assert counts[:, :3].sum(1).tolist() == [33] * 4
    assert np.ptp(counts.sum(0)[3:]) <= 1
    assert np.ptp(skewed_counts(balanced(8), 8, 4, 101).sum(0)) <= 1


def test_a_real_router_cannot_send_95_percent_to_one_expert():
    assert not Skew(Fraction(95, 100), 1).distinct(4)
    assert Skew(Fraction(95, 100), 4).distinct(4)
    assert not Skew(Fraction(95, 100), 4).distinct(8)
    assert Skew(Fraction(1, 4), 1).distinct(4)


@pytest.mark.parametrize(("shape", "tokens"), [(GPT_OSS_120B, 4096), (DEEPSEEK_V3, 2048)])
def test_table_of_a_layer(shape, tokens):
    run = SkewRun(shape, tokens, extra_slots=shape.num_experts // 32, max_rows_per_rank=30000)
    rows = skew_table(run, [balanced(shape.num_experts), Skew(Fraction(95, 100), 8)])
    assert [row["plan"] for row in rows[5:]] == ["ep", "llep global", "llep source_first", "fsdp_ep", "laer"]
    ep, published, local, fixed, laer = (dict(row) for row in rows[5:])
    for row in rows[:5]:
        assert row["ratio"] == pytest.approx(1, abs=0.01)
    assert ep["ratio"] > 7.6
    assert ep["rounds"] == 5
    assert published["ratio"] == local["ratio"] < 1.07
    assert laer["ratio"] < 1.1
    assert local["crossing"] <= published["crossing"]
    assert published["weight_bytes"] % shape.expert_bytes == 0
    assert fixed["weight_bytes"] == shape.num_experts // 8 * shape.expert_bytes * 7 // 8
    assert ep["peak_bytes"] > published["peak_bytes"]


def test_source_first_keeps_one_hot_expert_at_home():
    run = SkewRun(GPT_OSS_120B, 32768)
    rows = {row["plan"]: row for row in skew_table(run, [Skew(Fraction(95, 100), 1)])}
    assert rows["llep global"]["crossing"] == pytest.approx(0.875, abs=0.001)
    assert rows["llep source_first"]["crossing"] == pytest.approx(0.044, abs=0.001)
