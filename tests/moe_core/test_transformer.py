"""Attention with sinks and windows, rotary embeddings with YaRN: by hand."""

from __future__ import annotations

import numpy as np
import pytest
from twinmoe.backends.registry import Backend, load
from twinmoe.moe_core.config import ModelConfig, RopeScaling
from twinmoe.moe_core.data import GlobalBatch
from twinmoe.moe_core.model import _allowed
from twinmoe.moe_core.transformer import rotary_frequencies, sink_attention

S, L, H, G, A = 2, 7, 4, 2, 8


def batch(documents: np.ndarray) -> GlobalBatch:
    flat, order = np.zeros_like(documents), np.arange(len(documents))
    return GlobalBatch(flat, flat, flat == 0, documents, order, order, flat.size, flat.size)


def by_hand(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, sinks: np.ndarray, documents: np.ndarray, window: int
) -> np.ndarray:
    out = np.zeros_like(q)
    for s in range(S):
        for t in range(L):
            seen = [u for u in range(t + 1) if documents[s, u] == documents[s, t] and t - u < window]
            for h in range(H):
                g = h // (H // G)
                scores = np.array([q[s, t, h] @ k[s, u, g] / A**0.5 for u in seen] + [sinks[h]])
                p = np.exp(scores - scores.max())
                p /= p.sum()
                out[s, t, h] = sum(p[i] * v[s, u, g] for i, u in enumerate(seen))
    return out


@pytest.mark.parametrize("window", [3, L])
@pytest.mark.parametrize("documents", [np.zeros((S, L), int), np.array([[0, 0, 0, 1, 1, 1, 1], [0] * 7])])
def test_a_sink_takes_its_share_of_the_softmax(backend: Backend, documents: np.ndarray, window: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v, sinks = (rng.standard_normal(n).astype(np.float32) for n in ((S, L, H, A), (S, L, G, A), (S, L, G, A), H))
    ops = backend.ops
    allowed = _allowed(ops, batch(documents), window, sinks=True)
    assert (allowed is None) == (window == L and not documents.any())
    y = sink_attention(ops, ops.asarray(q), ops.asarray(k), ops.asarray(v), ops.asarray(sinks), allowed)
    np.testing.assert_allclose(ops.to_numpy(y), by_hand(q, k, v, sinks, documents, window), rtol=0, atol=2e-6)


def test_a_window_that_holds_the_sequence_is_none() -> None:
    ops = load("reference").ops
    documents = np.zeros((S, L), int)
    assert _allowed(ops, batch(documents), None, sinks=False) is None
    near = _allowed(ops, batch(documents), 2, sinks=False)
    assert near is not None
    expected = np.tril(np.ones((L, L), bool)) & ~np.tril(np.ones((L, L), bool), -2)
    np.testing.assert_array_equal(ops.to_numpy(near)[0], expected)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    """gpt-oss: width 64, base 150000, 32 times 4096. Pairs below 8.09 keep theirs, from 17.4 on they are divided."""
    scaling = RopeScaling(factor=32.0, original_length=4096, truncate=False)
    model = ModelConfig(hidden_size=64, num_attention_heads=1, rope_theta=150000.0, rope_scaling=scaling)
    plain, one = rotary_frequencies(model.model_copy(update={"rope_scaling": None}))
    found, scale = rotary_frequencies(model)
    assert one == 1.0
    assert scale == pytest.approx(0.1 * np.log(32) + 1)
    np.testing.assert_array_equal(found[:9], plain[:9])
    np.testing.assert_allclose(found[18:], plain[18:] / 32, rtol=1e-14)
    assert ((found[9:18] < plain[9:18]) & (found[9:18] > plain[9:18] / 32)).all()
