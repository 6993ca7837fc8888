"""`twinmoe bench router`: how long it takes to choose experts, beside plain softmax and top-k.

The baseline is x W, softmax, the framework's own top-k and its values: no order among equal scores, no look for NaN.
A backend offers its own top-k as `ops.plain_topk`; where it does not, the baseline uses the contract's `ops.topk`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..backends.protocol import Array, Ops
from ..backends.registry import Backend
from .config import MoeConfig
from .routing import ChooserRouter, Memo, RouterContext, Tokens, make_router

VOCABULARY, SEQUENCE = 32768, 1024


@dataclass(frozen=True)
class Case:
    """One line. fields: of MoeConfig; note: why it does more than the baseline."""

    router: str
    num_experts: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


LOSSES = {"aux_loss_coeff": 0.01, "z_loss_coeff": 0.001}
DEEPSEEK = {"score_function": "sigmoid", "num_groups": 8, "group_top_k": 4, "bias_update_rate": 0.001}
DROPS = {"capacity_factor": "1.25"}
SIZES = (8, 32, 128, 512)
VARIANTS: tuple[tuple[str, Mapping[str, Any], str], ...] = (
    ("topk", {}, "looks at k + 1 columns for ties"),
    ("switch", {}, "looks at k + 1 columns for ties"),
    ("grap", {"score_scale": "sqrt"}, "looks at k + 1 columns for ties"),
    ("hash", {}, ""),
    ("hierarchical", {"num_groups": 2}, ""),
    ("topk", LOSSES, "adds the balance and z losses"),
    ("topk", DEEPSEEK, "adds a top-k inside groups, one over groups, and the bias"),
    ("topk", DROPS, "adds two sorts of all copies for the capacity"),
    ("expert_token_resonance", DROPS, "adds the length of every token, and two sorts of all copies for the capacity"),
    ("expert_choice", {}, "sorts tokens instead of experts and has E columns of ids"),
)
CASES = tuple(
    Case(router, num_experts, fields, note)
    for num_experts in SIZES
    for router, fields, note in VARIANTS
    if num_experts >= 32 or fields is not DEEPSEEK
)


def run(
    backend: Backend, cases: Sequence[Case] = CASES, tokens: int = 8192, hidden_size: int = 1024, repeats: int = 9
) -> dict[str, Any]:
    """Milliseconds (best of `repeats`) of the forward pass in float32; router and baseline are timed in turn.

    Returns {rows: [{router, num_experts, tokens, hidden_size, milliseconds, baseline_milliseconds, activation_bytes,
    ratio, top_k, variant, note}], backend, baseline}. activation_bytes: scores, shares, weights and ids of a call.
    """
    rows = [_measure(backend, case, tokens, hidden_size, repeats) for case in cases]
    own = "the framework's top-k" if hasattr(backend.ops, "plain_topk") else "ops.topk"
    return {"rows": rows, "backend": backend.name, "baseline": f"x W, softmax, {own}"}


def plain(ops: Ops, x_TD: Array, w_DE: Array, k: int) -> tuple[Array, Array]:
    """(values, ids), both (T, k), of softmax(x W)."""
    topk: Callable[[Array, int], Array] = getattr(ops, "plain_topk", ops.topk)
    scores_TE = ops.softmax(x_TD @ w_DE)
    ids_TK = topk(scores_TE, k)
    return ops.take_along(scores_TE, ids_TK), ids_TK


def _measure(backend: Backend, case: Case, tokens: int, hidden_size: int, repeats: int) -> dict[str, Any]:
    ops, rng = backend.ops, np.random.default_rng(0)
    top_k = 1 if case.router == "switch" else 2 if case.num_experts < 64 else 8
    moe = MoeConfig(
        router=case.router, num_experts=case.num_experts, **{"top_k": top_k, "aux_loss_coeff": 0.0, **case.fields}
    )
    x_TD = ops.asarray(rng.standard_normal((tokens, hidden_size)).astype(np.float32))
    w_DE = ops.asarray((0.02 * rng.standard_normal((hidden_size, moe.num_experts))).astype(np.float32))
    router = make_router(RouterContext(ops, moe, hidden_size, vocab_size=VOCABULARY))
    params = {p.name: w_DE for p in router.parameters("")}
    where, state = _tokens(ops, tokens, rng), router.initial_state()
    calls = (
        lambda: router.route(params, x_TD, where, Memo(state)),
        lambda: plain(ops, x_TD, w_DE, top_k),
    )
    own, base = _in_turn(calls, repeats, backend.trainer.synchronize)
    held = 0
    if isinstance(router, ChooserRouter):
        choice = router.chooser.choose(params, x_TD, where, Memo(state))
        held = _bytes(ops, [choice.logits_TE, choice.shares_TE, choice.weights_TK, choice.scores_TK, choice.chosen_TK])
    return {
        "router": case.router,
        "num_experts": moe.num_experts,
        "tokens": tokens,
        "hidden_size": hidden_size,
        "milliseconds": own,
        "baseline_milliseconds": base,
        "activation_bytes": held,
        "ratio": own / base,
        "top_k": top_k,
        "variant": " ".join(f"{name}={value}" for name, value in case.fields.items()),
        "note": case.note,
    }


def _tokens(ops: Ops, tokens: int, rng: np.random.Generator) -> Tokens:
    sequences = max(1, tokens // SEQUENCE)
    ids = ops.asarray(rng.integers(0, VOCABULARY, tokens))
    return Tokens(sequences, float(tokens), token_ids_T=ids, domains_S=np.arange(sequences) % 2)


def _in_turn(calls: Sequence[Callable[[], Any]], repeats: int, synchronize: Callable[[], None]) -> tuple[float, ...]:
    """Least milliseconds of each call, interleaved: the round in which nobody else ran."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(repeats + 2):
        for call, seen in zip(calls, times, strict=True):
            synchronize()
            began = time.perf_counter()
            call()
            synchronize()
            if round_ >= 2:
                seen.append(1e3 * (time.perf_counter() - began))
    return tuple(min(seen) for seen in times)


def _bytes(ops: Ops, arrays: Sequence[Array | None]) -> int:
    """Bytes of distinct arrays."""
    distinct = {id(a): a for a in arrays if a is not None}
    return sum(ops.to_numpy(a).nbytes for a in distinct.values())
