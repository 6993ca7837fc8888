"""Experts choose tokens: exact balance, against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from twinmoe.backends.registry import Backend
from twinmoe.testing.moe_core.routing.support import gate_logits, host_softmax, layer_output, settings

MOE = settings(router="expert_choice", num_experts=4, top_k=2, aux_loss_coeff=1.0)
LOGITS = np.random.default_rng(0).standard_normal((12, 4))


def expected(logits: np.ndarray, real: np.ndarray, sequences: int, capacity: int) -> np.ndarray:
    ids, p = np.full(logits.shape, -1), host_softmax(logits)
    for rows in np.split(np.arange(len(logits)), sequences):
        for e in range(logits.shape[1]):
            taken = sorted((t for t in rows if real[t]), key=lambda t: (-p[t, e], t))[:capacity]
            ids[taken, e] = e
    return ids


@pytest.mark.parametrize(("factor", "sequences", "capacity"), [(None, 1, 6), (None, 3, 2), ("1.5", 2, 5), (9, 2, 6)])
def test_every_expert_takes_its_best_tokens_of_each_sequence(
    home: Backend, factor: object, sequences: int, capacity: int
) -> None:
    moe = MOE.model_copy(update={"capacity_factor": factor})
    routed = gate_logits(home, moe, LOGITS, sequences=sequences)
    np.testing.assert_array_equal(routed.ids, expected(LOGITS, np.ones(12, bool), sequences, capacity))
    counts = np.bincount(routed.ids[routed.ids >= 0], minlength=4)
    assert counts.tolist() == [sequences * capacity] * 4
    np.testing.assert_allclose(routed.losses["load_balance"], 1.0, rtol=1e-12)


def test_padding_is_not_chosen(home: Backend) -> None:
    real = np.arange(12) % 4 != 1
    routed = gate_logits(home, MOE, LOGITS, sequences=3, real_T=real, total=9.0)
    np.testing.assert_array_equal(routed.ids, expected(LOGITS, real, 3, 2))
    assert (routed.ids[~real] == -1).all()
    nothing = gate_logits(home, MOE, LOGITS, sequences=3, real_T=np.zeros(12, bool), total=9.0)
    assert (nothing.ids == -1).all()


def test_outputs_weigh_with_the_tokens_probabilities(home: Backend) -> None:
    routed = gate_logits(home, MOE.model_copy(update={"route_scale": 2.0}), LOGITS, sequences=3)
    a, x = np.array([1.0, 10, 100, 1000]), np.arange(1.0, 13)[:, None]
    mixing = np.where(expected(LOGITS, np.ones(12, bool), 3, 2) >= 0, 2 * host_softmax(LOGITS), 0)
    np.testing.assert_allclose(layer_output(home, routed, x, a), mixing @ a[:, None] * x, rtol=1e-12)
