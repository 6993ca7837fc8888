"""`ascend-torch` on the host: every contract case against the NumPy reference, npu_* calls bound to their schemas."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from twinmoe.ascend.torch_npu import comm, kernels, ops
from twinmoe.backends import protocol
from twinmoe.backends.torch_shared import ops as shared
from twinmoe.testing.ascend.torch_npu import npu_on_host
from twinmoe.testing.contract.adapters import TOLERANCES, TorchAdapter, assert_same, random_seed, reference
from twinmoe.testing.contract.cases import CASES, Case
from twinmoe.testing.contract.test_signatures import differences

npu_on_host.install()

OPS = SimpleNamespace(
    **{name: getattr(ops, name) for name in ops.__all__} | {"asarray": shared.asarray, "cast": shared.cast}
)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "-"))
def test_op_equals_the_reference(case: Case, dtype: str) -> None:
    inputs = [x.astype(dtype) if x.dtype.kind == "f" else x for x in case.inputs(np.random.default_rng(7))]
    found = TorchAdapter().evaluate(OPS, case.fn, inputs, random_seed)
    assert_same(found, reference(case.fn, inputs, random_seed), TOLERANCES[dtype], case.exact_zeros)


@pytest.mark.parametrize("padding", [0, 3])
def test_grouped_matmul_ignores_padding_rows_and_what_a_kernel_leaves_for_empty_groups(padding: int) -> None:
    x = np.concatenate([np.array([[1.0, 2], [0, 1], [-1, 1]]), np.full((padding, 2), np.nan)])
    w = np.array([[[9.0, 9], [9, 9]], [[1, 0], [2, 1]], [[7, 7], [7, 7]]])
    found = TorchAdapter().evaluate(
        OPS,
        lambda ops, x, w, c: ops.grouped_matmul(x, w, c),
        [x, w, np.array([0, 3, 0])],
        lambda i, value: np.ones(value.shape),
    )
    np.testing.assert_array_equal(found.values[0], [[5, 2], [2, 1], [1, 1]] + [[0, 0]] * padding)
    np.testing.assert_array_equal(found.grads[0], [[1, 3], [1, 3], [1, 3]] + [[0, 0]] * padding)
    np.testing.assert_array_equal(found.grads[1], [[[0, 0], [0, 0]], [[0, 0], [4, 4]], [[0, 0], [0, 0]]])


def test_a_dropped_copy_reads_no_row() -> None:
    rows = torch.tensor([[np.nan, np.inf], [3.0, 4.0]])
    y = ops.combine_rows(rows, torch.tensor([[1, -1]]), torch.tensor([[0.5, np.nan]]))
    assert y.tolist() == [[1.5, 2.0]]


@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_attention_goes_through_the_fused_kernel(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((2, 6, h, 8), generator=generator).bfloat16().requires_grad_() for h in (4, 2, 2))
    allowed = torch.ones(2, 6, 6, dtype=torch.bool).tril() if masked else None
    if allowed is not None:
        allowed[0, 3:, 0] = False
    fused, plain = (f(q, k, v, allowed) for f in (ops.attention, shared.attention))
    torch.testing.assert_close(fused, plain, rtol=2e-2, atol=2e-2)
    found, right = (torch.autograd.grad(y.float().square().sum(), (q, k, v)) for y in (fused, plain))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


def test_sums_of_bfloat16_rows_round_once() -> None:
    rows = torch.tensor([[1024.0], [4.0], [4.0], [4.0]]).bfloat16()
    y = ops.combine_rows(rows, torch.arange(4)[None], torch.full((1, 4), 0.25))
    assert y.dtype == torch.bfloat16
    assert y.tolist() == [[260.0]]


def test_limits_are_refused_in_a_sentence() -> None:
    ends = torch.tensor([4])
    with pytest.raises(ValueError, match="at most 1024 experts per rank"):
        kernels.grouped_rows(torch.ones(4, 3), torch.ones(1025, 3, 5), ends)
    with pytest.raises(ValueError, match="widths up to 65535"):
        kernels.grouped_weights(torch.ones(4, 3), torch.ones(4, 65536), ends)
    with pytest.raises(ValueError, match="512 experts per token"):
        kernels.unpermute(torch.ones(4, 3), torch.zeros(513, dtype=torch.int32), torch.ones(1, 513))
    with pytest.raises(ValueError, match="choose dtype float32 or bfloat16 for ascend-torch"):
        ops.cast(torch.ones(2), "float64")


def test_ascend_torch_has_the_contract_s_signatures() -> None:
    assert differences(protocol.Ops, ops) == []
    assert differences(protocol.Comm, comm) == []


def test_a_call_outside_the_schema_is_refused() -> None:
    with pytest.raises(RuntimeError, match="groups"):
        torch.ops.npu.npu_grouped_matmul([torch.ones(2, 2)], [torch.ones(1, 2, 2)], groups=torch.tensor([2]))
