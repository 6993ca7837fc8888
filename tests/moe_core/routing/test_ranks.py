"""Losses and statistics over virtual ranks: the layout must not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends.reference import ops, tape
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.backends.registry import load
from twinmoe.moe_core.routing import Memo, RouterContext, Tokens, make_router
from twinmoe.testing.moe_core.routing.support import route, settings

X = np.random.default_rng(0).standard_normal((16, 8))
W = np.random.default_rng(1).standard_normal((8, 4))
POOLED = settings(
    num_experts=4, top_k=2, aux_loss_coeff=1.0, aux_loss_scope="global", locality_loss_coeff=1.0, locality_nodes=2,
    z_loss_coeff=1.0, entropy_loss_coeff=1.0,
)  # fmt: skip


def over(ranks: int, moe: Any) -> tuple[Any, ...]:
    """Losses and statistics summed over ranks, dx of all tokens, dW summed: 4 sequences of 4 tokens."""

    def body(comm: Any) -> Any:
        group = comm.group("world", [list(range(comm.size))])
        mine = np.array_split(np.arange(4), ranks)[comm.rank]
        x = tape.variable(X.reshape(4, 4, 8)[mine].reshape(-1, 8))
        w = tape.variable(W)
        router = make_router(RouterContext(ops, moe, 8, comm=comm, group=group))
        tokens = Tokens(len(mine), 16.0, sequence_positions=mine, global_sequences=4)
        routing = router.route({"w_router": w}, x, tokens, Memo())
        total = sum(routing.losses.values(), tape.Var(0.0))
        dx, dw = tape.grad(total, [x, w])
        losses = {n: float(v.value) for n, v in routing.losses.items()}
        return losses, dx, dw, {n: v.value for n, v in routing.statistics.items()}

    found = run_ranks(ranks, body)
    losses = {n: sum(f[0][n] for f in found) for n in found[0][0]}
    statistics = {n: sum(f[3][n] for f in found) for n in found[0][3]}
    return losses, np.concatenate([f[1] for f in found]), sum(f[2] for f in found), statistics


@pytest.mark.parametrize("scope", ["node", "sequence"])
@pytest.mark.parametrize("balance", ["global", "sequence"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_and_gradients_do_not_depend_on_the_number_of_ranks(ranks: int, balance: str, scope: str) -> None:
    moe = POOLED.model_copy(update={"aux_loss_scope": balance, "locality_scope": scope})
    (one, dx_1, dw_1, seen_1), (many, dx_n, dw_n, seen_n) = over(1, moe), over(ranks, moe)
    assert set(one) == {"load_balance", "locality", "z", "entropy"}
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-12)
    np.testing.assert_allclose(dx_n, dx_1, atol=1e-14)
    np.testing.assert_allclose(dw_n, dw_1, atol=1e-14)
    for name, value in seen_1.items():
        np.testing.assert_array_equal(seen_n[name], value)


def test_pooled_losses_are_those_of_the_batch() -> None:
    losses, *_ = over(4, POOLED)
    alone = route(load("reference"), POOLED, X, W, sequences=4)
    for name, value in alone.losses.items():
        np.testing.assert_allclose(losses[name], value, rtol=1e-12)
