"""Each field case that needs several ranks, as a function that every rank of a world runs; it asserts its own numbers.

Assertions come after the collectives, so that a rank that fails is still in step with the others.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Component, Launch, Parameter, TrainOptions
from twinmoe.moe_core.build import LayerSpec, build_layer
from twinmoe.moe_core.routing import Memo, Tokens
from twinmoe.moe_core.transformer import scoped
from twinmoe.testing.field_cases.layer import Job, Scaled, close, one_step, parallel, settings, total

LONGEST = 4000
"""Characters that a rank may say about a failure."""


# --- D1: a rank whose experts get no token -----------------------------------------------------
P, A1 = 0.7310585786300049, (2.0, -3.0)
D1_TOKENS = ([[1, 2], [3, -1]], [[0.5, 0.5], [-2, 4]])
D1_LOGITS = ([1.1796715994, 0.7864477330], [0.3932238665, 0.7864477330])


def idle_expert(job: Job) -> None:
    """Every token goes to expert 0: rank 1 gets real zeros, and everybody comes to every collective."""
    scaled = Scaled(job, settings(num_experts=2), A1, expert=2, width=2)
    x = np.array(D1_TOKENS[job.rank], np.float64)
    seen = one_step(scaled, x, [[1.0, 0]] * 2)
    everyone = job.comm.gather_to_host(np.array([seen.loss]), scaled.runtime.groups["world"])
    close(everyone.sum(), 11.6969372581)
    close(seen.y, 1.4621171573 * x)
    close(seen.grads["x"], np.full((2, 2), 1.4621171573))
    close(seen.grads["logits"], np.stack([D1_LOGITS[job.rank], np.negative(D1_LOGITS[job.rank])], 1))
    assert seen.grads["a"].shape == (1, 1, 1)
    close(seen.grads["a"].item(), [5.8484686290, 0.0][job.rank])
    assert job.rank == 0 or seen.grads["a"].item() == 0.0


def idle_rank(job: Job) -> None:
    """(b) Rank 1 has no tokens either."""
    scaled = Scaled(job, settings(num_experts=2), A1, expert=2, width=2)
    x, logits = (D1_TOKENS[0], [[1.0, 0]] * 2) if job.rank == 0 else (np.zeros((0, 2)), np.zeros((0, 2)))
    seen = one_step(scaled, x, logits)
    assert seen.y.shape == np.shape(x)
    close(seen.grads["a"].item(), [3.6552928931, 0.0][job.rank])
    assert seen.grads["x"].shape == np.shape(x)


def experts_in_turn(job: Job) -> None:
    """(c) Ten steps, each to one expert, another one every time."""
    scaled = Scaled(job, settings(num_experts=2), A1, expert=2, width=2)
    for step in range(10):
        logits = np.eye(2)[[step % 2] * 2]
        seen = one_step(scaled, D1_TOKENS[job.rank], logits)
        assert (seen.grads["a"].item() != 0.0) == (job.rank == step % 2)


def same_collectives(job: Job) -> None:
    """Both ranks issue the same collectives, forward and backward, whoever is idle (virtual ranks keep a log)."""
    if not hasattr(job.comm, "log"):
        return
    scaled = Scaled(job, settings(num_experts=2), A1, expert=2, width=2)
    before = len(job.comm.log)
    one_step(scaled, D1_TOKENS[job.rank], [[1.0, 0]] * 2)
    names = [call.name for call in job.comm.log[before:]]
    assert names == ["gather_to_host", "all_to_all", "all_to_all", "all_to_all", "all_to_all"]


# --- D2: everything to one expert of one rank ---------------------------------------------------
D2_Y = {
    (1, "position"): [4.7536688642, 17.4009701312, 0, 0, 0],
    (1, "score"): [0, 17.4009701312, 0, 28.4493837691, 0],
    (4, "position"): [4.7536688642, 17.4009701312, 10.6398373318, 28.4493837691, 0],
    (4, "score"): [4.7536688642, 17.4009701312, 0, 28.4493837691, 29.9510513482],
}


def collapse(job: Job) -> None:
    """Five tokens of rank 0 want its expert 0; what is dropped is exactly 0 and gives the expert no gradient."""
    logits = np.zeros((5, 4))
    logits[:, 0] = [1, 3, 0.5, 2, 1.5]
    x = np.arange(1.0, 6)[:, None]
    for (minimum, policy), y in D2_Y.items():
        moe = settings(num_experts=4, capacity_factor=1.0, min_capacity=minimum, drop_policy=policy)
        scaled = Scaled(job, moe, (10.0, 20, 30, 40), expert=job.size)
        seen = one_step(scaled, x, logits) if job.rank == 0 else one_step(scaled, np.zeros((0, 1)), np.zeros((0, 4)))
        if job.rank == 0:
            close(seen.y[:, 0], y)
            assert not seen.y[np.equal(y, 0)].any()
            assert not seen.grads["x"][np.equal(y, 0)].any()
            close(seen.grads["a"].reshape(-1)[0], sum(y) / 10)
        assert not seen.grads["a"].reshape(-1)[1 if job.rank == 0 else 0 :].any()


# --- D3: ranks of different length --------------------------------------------------------------
D3_Y = ([3.25, 650, 9.75, 1300, 16.25, 1950, 22.75], [26, 2925, 32.5])


def one_capacity(job: Job) -> None:
    """Own capacities are 5 and 2, the shared one 5: nothing is dropped; also with no token on rank 1, and dropless.

    On four ranks: combine returns whole sums (D14: summed over ranks once more, 3.25 would be 13).
    """
    high, low = math.log(0.75), math.log(0.25)
    rows = np.array([[high, low, -50, -50], [-50, -50, high, low]])
    for capacity in ({"capacity_factor": "1.25", "capacity_group": "rank", "drop_policy": "position"}, {}):
        for lengths in ((7, 3, 0, 0), (7, 0, 0, 0)):
            moe = settings(num_experts=4, top_k=2, norm_topk_prob=True, **capacity)
            scaled = Scaled(job, moe, (1.0, 10, 100, 1000), expert=job.size)
            number = lengths[job.rank]
            x = np.arange(1.0, number + 1)[:, None] + 7 * job.rank
            seen = one_step(scaled, x, rows[np.arange(number) % 2])
            close(seen.y[:, 0], D3_Y[job.rank][:number] if number else [])


# --- D6: the balance loss under accumulation and data parallelism -------------------------------
D6 = np.array([[[1, 0], [0.5, 0]], [[2, 0], [1, 0]], [[0, 1], [0, 0.5]], [[3, 0], [0.25, 0]]])


def balance_under_accumulation(job: Job) -> None:
    """Four micro-batches on however many ranks: the gradient in a shared bias, through the trainer's reduction."""
    for expert in {1, min(2, job.size)}:
        value, gradient = accumulated_balance(job, expert)
        close(value, 1.4584105260)
        close(1.7 + 0.01 * value, 1.7145841053)
        close(gradient, [0.0014822907, -0.0014822907], 1e-7)


def accumulated_balance(job: Job, expert: int) -> tuple[float, np.ndarray]:
    """(balance loss over all ranks, gradient of 0.01 x it in the bias)."""
    bias = Parameter("b", (2,), lambda: np.zeros(2))
    scaled = Scaled(job, settings(num_experts=2, aux_loss_coeff=0.01), (1.0, 1.0), expert, extra=(bias,))
    state = scaled.state(np.ones((2, 1)), np.zeros((2, 2)))
    trainer, ops, value = job.backend.trainer, job.ops, 0.0
    for logits in D6[job.rank :: job.size]:

        def loss_fn(logits: np.ndarray = logits) -> tuple[Any, Any]:
            out, _ = state.modules["layer"](Tokens(1, 8.0), ops.asarray(logits))
            loss = out.losses["load_balance"]
            return loss * 0.01 + total(ops, out.y) * 0.0, loss

        _, loss = trainer.accumulate(state, loss_fn)
        value += float(ops.to_numpy(loss))
    trainer.reduce_gradients(state)
    everyone = job.comm.gather_to_host(np.array([value]), scaled.runtime.groups["world"])
    return float(everyone.sum()), trainer.gradients(state)["b"]


# --- D9: expert gradients -----------------------------------------------------------------------
D9_TOKENS = ([1, 2], [4, 8], [16, 32], [64, 128])
D9 = {2: ([1.25, 2.5], 16.25), 4: ([10.625, 21.25], 138.125)}


def expert_gradients(job: Job) -> None:
    """Token 0 of each rank to expert 0, token 1 to expert 1: the same for every number of expert ranks, any place."""
    (first, second), shared = D9[job.size]
    d = Parameter("d", (1,), lambda: np.ones(1))
    for expert, placement in ((1, None), (2, (0, 1)), (2, (1, 0))):
        scaled = Scaled(job, settings(num_experts=2), (3.0, 5.0), expert, placement=placement, extra=(d,))
        x = np.array(D9_TOKENS[job.rank], np.float64)[:, None]
        seen = one_step(scaled, x, [[60.0, -60], [-60, 60]], scale=1.0 / (2 * job.size))
        for expert_id, gradient in zip(scaled.mine, seen.grads["a"].reshape(-1)):
            close(gradient, [first, second][expert_id])
        close(seen.grads["d"], [shared])


# --- D10: the clipping norm ---------------------------------------------------------------------
def clipping_norm(job: Job) -> None:
    """Norm 13 on every rank and in every world; after clipping to 6.5 everything is halved."""
    groups = job.runtime(expert=2).groups
    expert = [[4.0, 0], [12.0, 0]][groups["expert"].index]
    wanted = {"dense": np.array([1.0, 2, 2]), "expert": np.array([expert])}
    replicas = {"dense": job.size, "expert": job.size // 2}
    parameters = (
        Parameter("dense", (3,), lambda: np.zeros(3)),
        Parameter("expert", (1, 2), lambda: np.zeros((1, 2)), reduce_over="expert_data", norm_over="expert"),
    )
    ops, trainer = job.ops, job.backend.trainer

    def forward(params: Any) -> Any:
        parts = [
            (params[n].reshape((-1,)) * ops.asarray(g.reshape(-1) / replicas[n])).sum(0) for n, g in wanted.items()
        ]
        return parts[0] + parts[1]

    options = TrainOptions(dtype="float64", optimizer="sgd")
    state = trainer.build([Component("c", parameters, forward)], options, groups, job.comm)
    trainer.accumulate(state, lambda: (state.modules["c"](), None))
    trainer.reduce_gradients(state)
    norm = trainer.clip_gradients(state, 6.5)
    found = trainer.gradients(state)
    close(norm, 13.0, 1e-12)
    for name, gradient in wanted.items():
        close(found[name], gradient / 2, 1e-12)


# --- D13: one bad token -------------------------------------------------------------------------
def bad_token(job: Job) -> None:
    """A token whose vector is NaN: experts' gradients stay finite, other tokens are bit-equal to a run without it."""
    moe = settings(num_experts=4, top_k=2, expert_hidden_size=5, nan_policy="skip", aux_loss_coeff=0.1)
    x = np.random.default_rng([13, job.rank]).standard_normal((6, 4))
    bad = x.copy()
    bad[2] = np.nan
    real = np.arange(6) != 2
    found = [whole_layer(job, moe, bad, None), whole_layer(job, moe, x, real)]
    for y, grads in found:
        assert all(np.isfinite(g).all() for n, g in grads.items() if n != "x")
        assert np.isfinite(y[real]).all()
        assert np.isfinite(grads["x"][real]).all()
    np.testing.assert_array_equal(found[0][0][real], found[1][0][real])
    for name in ("moe.w_up", "moe.w_down", "moe.w_router"):
        np.testing.assert_array_equal(found[0][1][name], found[1][1][name])


def whole_layer(job: Job, moe: Any, x: np.ndarray, real: np.ndarray | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(y, reduced gradients) of the layer that a config builds; loss = sum of y over real tokens + balance."""
    runtime, ops, trainer = job.runtime(expert=2), job.ops, job.backend.trainer
    parts = build_layer(moe, parallel(), runtime, LayerSpec(x.shape[1], "moe.", seed=1, std=0.4, std_down=0.4))
    own = Parameter("x", x.shape, x.copy, reduce_over="self", norm_over="world")
    groups = {**runtime.groups, "self": replace(runtime.groups["world"], name="self", ranks=(job.rank,), index=0)}
    tokens = Tokens(1, float(len(x)), real_T=None if real is None else ops.asarray(real))
    component = Component(
        "layer", (*parts.parameters, own), lambda p: parts.layer(scoped(p, "moe."), p["x"], tokens, Memo())
    )
    state = trainer.build([component], TrainOptions(dtype="float64", optimizer="sgd"), groups, job.comm)
    wanted = ops.asarray((np.arange(len(x)) != 2)[:, None])

    def loss_fn() -> tuple[Any, Any]:
        out = state.modules["layer"]()
        return total(ops, ops.where(wanted, out.y, 0.0)) + out.losses["load_balance"], out.y

    _, y = trainer.accumulate(state, loss_fn)
    trainer.reduce_gradients(state)
    return ops.to_numpy(y), trainer.gradients(state)


TWO: dict[str, Callable[[Job], None]] = {
    fn.__name__: fn
    for fn in (
        idle_expert,
        idle_rank,
        experts_in_turn,
        same_collectives,
        collapse,
        one_capacity,
        balance_under_accumulation,
        expert_gradients,
        clipping_norm,
        bad_token,
    )
}
ON_FOUR = ("collapse", "one_capacity", "balance_under_accumulation", "expert_gradients", "clipping_norm")
FOUR = {name: TWO[name] for name in ON_FOUR}


def run_all(backend: Any, comm: Any) -> dict[str, str]:
    """What went wrong by scenario, from all ranks; '' = nothing. A failure in a collective is one of all later ones."""
    world = comm.group("everyone", [list(range(comm.size))])
    found = {}
    for name, scenario in (TWO if comm.size == 2 else FOUR).items():
        told = ""
        try:
            scenario(Job(backend, comm))
        except Exception:
            told = f"rank {comm.rank}:\n{traceback.format_exc()[-LONGEST + 20 :]}"
        texts = comm.gather_to_host(np.frombuffer(told.encode("ascii", "replace").ljust(LONGEST), np.uint8), world)
        found[name] = "\n".join(filter(None, (row.tobytes().decode().strip() for row in texts.astype(np.uint8))))
    return found


def process(backend: Any, launch: Launch) -> dict[str, str]:
    """The target of `processes.run_processes`."""
    comm = backend.comm.connect(launch)
    found = run_all(backend, comm)
    comm.close()
    return found
