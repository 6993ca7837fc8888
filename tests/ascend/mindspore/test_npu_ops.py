"""`npu_ops` on the host: every contract case against the NumPy reference, through stand-ins for the device kernels."""

from __future__ import annotations

import numpy as np
import pytest
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.contract.adapters import TOLERANCES, MindSporeAdapter, assert_same, random_seed, reference
from twinmoe.testing.contract.cases import CASES, Case

load_or_skip("mindspore-cpu")

from twinmoe.testing.ascend.mindspore import ascend_on_host  # noqa: E402

OPS = ascend_on_host.make()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "-"))
def test_op_equals_the_reference(case: Case, dtype: str) -> None:
    inputs = [x.astype(dtype) if x.dtype.kind == "f" else x for x in case.inputs(np.random.default_rng(7))]
    found = MindSporeAdapter().evaluate(OPS, case.fn, inputs, random_seed)
    assert_same(found, reference(case.fn, inputs, random_seed), TOLERANCES[dtype], case.exact_zeros)


@pytest.mark.parametrize("padding", [0, 3])
def test_grouped_matmul_ignores_padding_rows_and_what_a_kernel_leaves_for_empty_groups(padding: int) -> None:
    x = np.concatenate([np.array([[1.0, 2], [0, 1], [-1, 1]]), np.full((padding, 2), np.nan)])
    w = np.array([[[9.0, 9], [9, 9]], [[1, 0], [2, 1]], [[7, 7], [7, 7]]])
    found = MindSporeAdapter().evaluate(
        OPS,
        lambda ops, x, w, c: ops.grouped_matmul(x, w, c),
        [x, w, np.array([0, 3, 0])],
        lambda i, value: np.ones(value.shape),
    )
    np.testing.assert_array_equal(found.values[0], [[5, 2], [2, 1], [1, 1]] + [[0, 0]] * padding)
    np.testing.assert_array_equal(found.grads[0], [[1, 3], [1, 3], [1, 3]] + [[0, 0]] * padding)
    np.testing.assert_array_equal(found.grads[1], [[[0, 0], [0, 0]], [[0, 0], [4, 4]], [[0, 0], [0, 0]]])


def test_a_dropped_copy_reads_no_row() -> None:
    rows = OPS.asarray(np.array([[np.nan, np.inf], [3.0, 4.0]], np.float32))
    weights = OPS.asarray(np.array([[0.5, np.nan]], np.float32))
    y = OPS.combine_rows(rows, OPS.asarray(np.array([[1, -1]])), weights)
    assert OPS.to_numpy(y).tolist() == [[1.5, 2.0]]
