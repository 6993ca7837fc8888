"""LAER's cost model, exactly."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
from twinmoe.moe_core.planners.cost import CostModel, cost_of

NODE = np.array([0, 0, 1])
SEND = np.array([[5, 2, 3], [0, 7, 1], [4, 0, 0]])
MODEL = CostModel(Fraction(1), Fraction(10), Fraction(2), recompute=False)


def test_the_busiest_source_and_the_busiest_rank_count():
    cost = cost_of(SEND, NODE, MODEL)
    assert cost.comm == 4 * 40
    assert cost.compute == 3 * 2 * 9
    assert cost.total == 4 * 40 + 54


def test_sum_counts_all_sources_and_recomputation_one_forward_more():
    cost = cost_of(SEND, NODE, replace(MODEL, comm="sum", recompute=True))
    assert cost.comm == 4 * (2 + 30 + 10 + 40)
    assert cost.compute == 4 * 2 * 9


def test_messages_cost_latency_and_rows_that_stay_are_free():
    model = replace(MODEL, message_near=Fraction(1, 3), message_far=Fraction(1, 7))
    assert cost_of(np.array([[0, 2, 3], [0, 0, 0], [0, 0, 0]]), NODE, model).comm == 4 * (
        32 + Fraction(1, 3) + Fraction(1, 7)
    )
    assert cost_of(np.diag([9, 9, 9]), NODE, model).comm == 0


def test_measured_rates():
    model = CostModel.measured(8192, 216_269_000_000, 88_953_900_000, Fraction("1.484375e-6"))
    assert model.row_near == Fraction(8192, 216_269_000_000)
    assert model.row_far > model.row_near
