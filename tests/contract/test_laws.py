"""Laws between ops that hold for any sizes and values, on every backend that loads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmoe.backends.registry import Backend

sizes = st.integers(0, 9)
few = settings(max_examples=40, deadline=None, derandomize=True)


def host(backend: Backend, x: Any) -> np.ndarray:
    return backend.ops.to_numpy(x)


@few
@given(seed=st.integers(0, 999), rows=sizes, wanted=sizes, width=st.integers(1, 4))
def test_sum_rows_is_the_transpose_of_take_rows(
    backend: Backend, seed: int, rows: int, wanted: int, width: int
) -> None:
    """<take_rows(x, i), y> = <x, sum_rows(y, i)>."""
    ops, rng = backend.ops, np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, width)), rng.normal(size=(wanted, width))
    index = ops.asarray(rng.integers(-1, rows, wanted))
    taken = host(backend, ops.take_rows(ops.asarray(x), index))
    summed = host(backend, ops.sum_rows(ops.asarray(y), index, rows))
    assert float((taken * y).sum()) == pytest.approx(float((x * summed).sum()), rel=1e-12, abs=1e-12)


@few
@given(keys=st.lists(st.integers(0, 6), max_size=30))
def test_argsort_orders_and_invert_undoes_it(backend: Backend, keys: list[int]) -> None:
    ops, array = backend.ops, np.array(keys, np.int64)
    order = ops.argsort(ops.asarray(array))
    np.testing.assert_array_equal(host(backend, ops.take_rows(ops.asarray(array), order)), np.sort(array))
    np.testing.assert_array_equal(host(backend, ops.take_rows(order, ops.invert(order))), np.arange(len(keys)))


@few
@given(ids=st.lists(st.integers(-3, 12), max_size=40), num=st.integers(1, 10))
def test_count_counts_every_id_in_range_once(backend: Backend, ids: list[int], num: int) -> None:
    array = np.array(ids, np.int64)
    counts = host(backend, backend.ops.count(backend.ops.asarray(array), num))
    assert counts.shape == (num,)
    assert counts.sum() == ((array >= 0) & (array < num)).sum()


@few
@given(seed=st.integers(0, 999), rows=sizes, experts=st.integers(1, 9), data=st.data())
def test_topk_is_the_start_of_a_stable_descending_sort(
    backend: Backend, seed: int, rows: int, experts: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, experts))
    scores = np.random.default_rng(seed).integers(-2, 3, (rows, experts)) / 2.0
    ids = host(backend, backend.ops.topk(backend.ops.asarray(scores), k))
    expected = [sorted(range(experts), key=lambda e: (-row[e], e))[:k] for row in scores.tolist()]
    np.testing.assert_array_equal(ids, np.array(expected, np.int64).reshape(rows, k))


@few
@given(seed=st.integers(0, 999), counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), extra=st.integers(0, 3))
def test_grouped_matmul_is_one_matmul_per_group(backend: Backend, seed: int, counts: list[int], extra: int) -> None:
    ops, rng = backend.ops, np.random.default_rng(seed)
    x, w = rng.normal(size=(sum(counts) + extra, 3)), rng.normal(size=(len(counts), 3, 2))
    y = host(backend, ops.grouped_matmul(ops.asarray(x), ops.asarray(w), ops.asarray(np.array(counts))))
    group = np.repeat(np.arange(len(counts)), counts)
    np.testing.assert_allclose(
        y[: sum(counts)], np.einsum("nd,ndf->nf", x[: sum(counts)], w[group]), rtol=1e-12, atol=1e-12
    )
    assert not y[sum(counts) :].any()


@few
@given(seed=st.integers(0, 999), tokens=sizes, k=st.integers(1, 4), dropped=st.floats(0, 1))
def test_combine_undoes_a_permutation_of_copies(
    backend: Backend, seed: int, tokens: int, k: int, dropped: float
) -> None:
    """Rows sorted in any order and combined with weights equal the weighted sum of what each token kept."""
    ops, rng = backend.ops, np.random.default_rng(seed)
    position = rng.permutation(tokens * k).reshape(tokens, k)
    position = np.where(rng.random((tokens, k)) < dropped, -1, position)
    rows, weights = rng.normal(size=(tokens * k, 2)), rng.normal(size=(tokens, k))
    y = host(backend, ops.combine_rows(ops.asarray(rows), ops.asarray(position), ops.asarray(weights)))
    expected = np.zeros((tokens, 2))
    for t, j in np.argwhere(position >= 0).tolist():
        expected[t] += weights[t, j] * rows[position[t, j]]
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert not y[(position < 0).all(1)].any()
