"""Load balance, z and entropy: P6 and the field cases D4, D5, D6 and D13 (input B)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.routing.base import Tokens, times
from twinmoe.moe_core.routing.losses import (
    combine_layers,
    entropy_loss,
    load_balance,
    loss_coefficients,
    z_loss,
)
from twinmoe.testing.moe_core.routing.support import (
    close,
    finite_differences,
    gate_logits,
    gradients,
    host_softmax,
    loss_gradients,
    settings,
)


# --- P6 --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("f", "p", "loss"),
    [
        ([0.25] * 4, [0.25] * 4, 0.01),
        ([0.5, 0.25, 0.125, 0.125], [0.4, 0.3, 0.2, 0.1], 0.0125),
        ([1, 0, 0, 0], [1, 0, 0, 0], 0.04),
        ([1, 0, 0, 0], [0.28, 0.24, 0.24, 0.24], 0.0112),
    ],
)
def test_load_balance_of_given_shares(home: Backend, f: list[float], p: list[float], loss: float) -> None:
    """8 tokens; the gradient reaches the probabilities only: E f / T each."""
    counts = np.array([f]) * 8.0

    def fn(ops: Any, counts_GE: Any, mass_GE: Any) -> Any:
        return times(ops, load_balance(ops.stop_gradient(counts_GE), mass_GE, ops, 8.0), 0.01)

    value, (_, d_mass) = gradients(home, fn, counts, np.array([p]) * 8.0)
    close(value, loss)
    close(d_mass, 0.01 * 4 * np.array([f]) / 8)


# --- D4: padding -----------------------------------------------------------------------------
D4 = np.array([[2.0, 1, 0, 0], [2, 0, 1, 0], [1, 0, 0, 2], [0, 1, 2, 0], [0, 3, 3, 0], [0, 3, 3, 0]])
D4_TOKENS = {"sequences": 2, "real_T": [True] * 4 + [False] * 2, "total": 4.0}
GLOBAL = settings(num_experts=4, top_k=2, aux_loss_coeff=0.01, aux_loss_scope="global")


def test_padding_stays_out_of_the_balance_loss(home: Backend) -> None:
    """D4: f sums to 1, hence 1.0837027303 and not its double; padding rows get exactly no gradient."""
    value, (d_logits, _) = loss_gradients(home, GLOBAL, "load_balance", D4, np.eye(4), **D4_TOKENS)
    close(value, 1.0837027303)
    close(d_logits[0], [0.0360302441, -0.0148096184, -0.0054481541, -0.0157724716])
    assert not d_logits[4:].any()
    counted = gate_logits(home, GLOBAL, D4, **D4_TOKENS)
    np.testing.assert_array_equal(np.bincount(counted.chosen[counted.chosen >= 0], minlength=4), [3, 2, 2, 1])
    assert (counted.chosen[4:] == -1).all()


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_what_stands_in_padding_does_not_move_any_loss(home: Backend, scope: str) -> None:
    moe = settings(
        num_experts=4, top_k=2, aux_loss_coeff=1, z_loss_coeff=1, entropy_loss_coeff=1, aux_loss_scope=scope,
        locality_loss_coeff=1, locality_nodes=2,
    )  # fmt: skip
    other = D4.copy()
    other[4:] = [[-5, 7, 1, 2], [9, 0, 0, 9]]
    assert gate_logits(home, moe, D4, **D4_TOKENS).losses == gate_logits(home, moe, other, **D4_TOKENS).losses


def test_a_batch_of_padding_only_gives_zero_losses(home: Backend) -> None:
    moe = settings(num_experts=4, top_k=2, aux_loss_coeff=1, z_loss_coeff=1, locality_loss_coeff=1, locality_nodes=2)
    routed = gate_logits(home, moe, D4, sequences=2, real_T=[False] * 6, total=4.0)
    assert set(routed.losses.values()) == {0.0}
    assert (routed.ids == -1).all()


# --- D5: layers first, and the factor k ---------------------------------------------------------
LAYER_1, LAYER_2 = [[2.0, 0]] * 4, [[0.0, 2]] * 4


def test_opposite_imbalances_of_two_layers_do_not_cancel(home: Backend) -> None:
    moe = settings(num_experts=2, top_k=1, aux_loss_coeff=0.01, aux_loss_scope="global")
    layers = [gate_logits(home, moe, z, layers=2).losses["load_balance"] for z in (LAYER_1, LAYER_2)]
    close([2 * layer for layer in layers], [1.7615941560] * 2)
    close(sum(layers), 1.7615941560)


def test_concatenated_layers_are_hugging_faces_number(home: Backend) -> None:
    moe = settings(num_experts=2, top_k=1, aux_loss_coeff=0.01, aux_loss_scope="global", aux_loss_layers="concatenated")
    ops, summed = home.ops, {}
    for z in (LAYER_1, LAYER_2):
        for name, value in gate_logits(home, moe, z, layers=2).device.losses.items():
            summed[name] = summed[name] + value if name in summed else value
    whole = combine_layers(ops, moe, summed, total=4.0, layers=2)
    assert set(whole) == {"load_balance"}
    close(ops.to_numpy(whole["load_balance"]), 1.0)


def test_the_balance_loss_does_not_grow_with_k(home: Backend) -> None:
    balanced = gate_logits(home, GLOBAL, [[3.0, 3, 0, 0], [0, 0, 3, 3]]).losses["load_balance"]
    collapsed = gate_logits(home, GLOBAL, [[3.0, 3, 0, 0]] * 2).losses["load_balance"]
    close([balanced, collapsed], [1.0, 1.9051482536])


# --- D6: accumulation and data parallelism --------------------------------------------------------
D6 = np.array([[[1, 0], [0.5, 0]], [[2, 0], [1, 0]], [[0, 1], [0, 0.5]], [[3, 0], [0.25, 0]]])


def d6_gradient(home: Backend, scope: str, batches: list[np.ndarray], sequences: int) -> tuple[float, np.ndarray]:
    """Loss and gradient in the bias b, over micro-batches whose contributions add up; coefficient 0.01."""
    moe = settings(num_experts=2, top_k=1, aux_loss_coeff=0.01, aux_loss_scope=scope)
    value, gradient = 0.0, np.zeros(2)
    for z in batches:
        part, (d_logits, _) = loss_gradients(home, moe, "load_balance", z, np.eye(2), sequences=sequences, total=8.0)
        value, gradient = value + part, gradient + d_logits.sum(0)
    return value, 0.01 * gradient


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_sequence_scope_is_free_of_micro_batches(home: Backend, micro_batches: int) -> None:
    batches = [z.reshape(-1, 2) for z in np.split(D6, micro_batches)]
    value, gradient = d6_gradient(home, "sequence", batches, 4 // micro_batches)
    close(value, 1.4584105260)
    close(gradient, [0.0014822907, -0.0014822907], 1e-7)
    close(1.7 + 0.01 * value, 1.7145841053)


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_every_micro_batch_has_the_sheets_loss_and_gradient(home: Backend, scope: str) -> None:
    """One sequence each: both definitions agree. A share of 2 in 8 tokens, hence the factor 4."""
    found = [d6_gradient(home, scope, [z], 1) for z in D6]
    close([4 * value for value, _ in found], [1.3535179098, 1.6118556566, 1.3535179098, 1.5147506277])
    close([400 * g[0] for _, g in found], [0.4316156454, 0.3016055186, -0.4316156454, 0.2913107425])


def test_global_scope_over_one_batch_is_the_other_definition(home: Backend) -> None:
    value, gradient = d6_gradient(home, "global", [D6.reshape(-1, 2)], 4)
    close(value, 1.1408257855)
    close(gradient, [0.0018201844, -0.0018201844], 1e-7)


# --- D13 B, entropy, coefficients -----------------------------------------------------------------
Z = np.array([[12.0, 12, 0, 0], [100, 0, -100, 0], [-50] * 4, [0] * 4])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-6)])
def test_z_loss_is_stable(home: Backend, dtype: str, tolerance: float) -> None:
    value, (d_logits,) = gradients(home, lambda ops, z: z_loss(ops, z, Tokens(1, 4.0)), Z.astype(dtype))
    close(value, 3131.5825823313, tolerance)
    np.testing.assert_allclose(d_logits[0], [3.1732686239, 3.1732686239, 0.0000193268, 0.0000193268], atol=1e-5)
    np.testing.assert_allclose(d_logits[1], [50, 0, 0, 0], atol=1e-5)
    lse = np.log(np.exp(Z[0]).sum())
    np.testing.assert_allclose(d_logits[0], 2 * lse * host_softmax(Z[0]) / 4, rtol=10 * tolerance)


def test_entropy_is_that_of_the_tokens(home: Backend) -> None:
    p = host_softmax(D4)

    def fn(ops: Any, logits: Any) -> Any:
        return entropy_loss(ops, ops.softmax(logits), Tokens(1, 6.0))

    value, (d_logits,) = gradients(home, fn, D4)
    close(value, -(p * np.log(p)).sum(1).mean())
    expected = finite_differences(lambda z: -(host_softmax(z) * np.log(host_softmax(z))).sum(1).mean(), D4)
    close(d_logits, expected, 1e-7)
    sharp = np.array([[2000.0, 0, 0, 0]])
    close(gradients(home, fn, sharp)[0], 0.0)


def test_the_locality_coefficient_rises_from_its_start() -> None:
    moe = settings(locality_loss_coeff=0.2, locality_start_step=10, locality_ramp_steps=4)
    seen = [loss_coefficients(moe, step)["locality"] for step in (0, 10, 11, 13, 14, 99)]
    close(seen, [0, 0, 0.05, 0.15, 0.2, 0.2])
    assert loss_coefficients(moe)["locality"] == 0.2
    assert loss_coefficients(settings(locality_loss_coeff=0.2), 0)["locality"] == 0.2
