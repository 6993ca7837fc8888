"""The router benchmark: its rows, its baseline, and that every case can run."""

from __future__ import annotations

import numpy as np
from twinmoe.backends.registry import load
from twinmoe.moe_core.bench_router import CASES, Case, plain, run

KEYS = {"router", "num_experts", "tokens", "hidden_size", "milliseconds", "baseline_milliseconds", "activation_bytes"}


def test_every_case_gives_a_row_with_the_promised_keys() -> None:
    small = [case for case in CASES if case.num_experts <= 32]
    report = run(load("reference"), small, tokens=16, hidden_size=64, repeats=1)
    assert len(report["rows"]) == len(small)
    for case, row in zip(small, report["rows"], strict=True):
        assert row.keys() >= KEYS
        assert (row["router"], row["num_experts"], row["tokens"]) == (case.router, case.num_experts, 16)
        assert row["milliseconds"] > 0
        assert row["activation_bytes"] > 0


def test_the_baseline_is_softmax_and_the_frameworks_own_top_k() -> None:
    backend, rng = load("cpu"), np.random.default_rng(0)
    x, w = rng.standard_normal((7, 8)), rng.standard_normal((8, 5))
    ops = backend.ops
    values, ids = (ops.to_numpy(a) for a in plain(ops, ops.asarray(x), ops.asarray(w), 2))
    p = np.exp(x @ w) / np.exp(x @ w).sum(1, keepdims=True)
    np.testing.assert_array_equal(ids, np.argsort(-p, 1)[:, :2])
    np.testing.assert_allclose(values, np.sort(p, 1)[:, ::-1][:, :2])
    report = run(backend, [Case("topk", 8)], tokens=8, hidden_size=8, repeats=1)
    assert report["baseline"] == "x W, softmax, the framework's top-k"
