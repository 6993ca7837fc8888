"""Ascend-only primitives check their arguments on any machine before they look for a kernel.

RuntimeError "unregistered" means: these arguments are right, this device has no such kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from twinmoe.testing.conftest import load_or_skip

HOME = load_or_skip("mindspore-cpu")

import mindspore as ms  # noqa: E402
from mindspore import Tensor  # noqa: E402
from twinmoe.ascend.mindspore import npu_kernels, npu_ops, plain_rows  # noqa: E402
from twinmoe.ascend.mindspore.framework import mint, ops  # noqa: E402


def floats(*shape: int) -> Tensor:
    return Tensor(np.ones(shape, np.float32))


def half(*shape: int) -> Tensor:
    return floats(*shape).astype(ms.bfloat16)


ENDS = Tensor(np.array([1, 4], np.int64))
HIDDEN = Tensor(np.triu(np.ones((1, 1, 5, 5), bool), 1))

CALLS: dict[str, tuple[str, Callable[[], Any]]] = {
    "grouped rows": ("GroupedMatmulV4", lambda: npu_kernels.grouped_rows(floats(4, 3), floats(2, 3, 5), ENDS)),
    "grouped rows with a transposed view": (
        "GroupedMatmulV4",
        lambda: npu_kernels.grouped_rows(floats(4, 5), mint.transpose(floats(2, 3, 5), 1, 2), ENDS),
    ),
    "grouped weights": ("GroupedMatmulV4", lambda: npu_kernels.grouped_weights(floats(4, 3), floats(4, 5), ENDS)),
    "swiglu": ("Swiglu", lambda: npu_kernels.swiglu(floats(4, 6))),
    "rms_norm": ("RmsNorm", lambda: npu_kernels.rms_norm(floats(4, 6), floats(6), 1e-6)),
    "flash attention, causal": (
        "FlashAttentionScore",
        lambda: npu_kernels.flash_attention(half(2, 5, 4, 8), half(2, 5, 2, 8), half(2, 5, 2, 8), HIDDEN, True),
    ),
    "flash attention, masked": (
        "FlashAttentionScore",
        lambda: npu_kernels.flash_attention(half(1, 5, 4, 8), half(1, 5, 4, 8), half(1, 5, 4, 8), HIDDEN, False),
    ),
    "stable argsort": ("ArgSort", lambda: plain_rows.argsort(Tensor(np.array([2, 0, 2])))),
    "expert_mlp": (
        "GroupedMatmulV4",
        lambda: npu_ops.expert_mlp(floats(4, 3), floats(2, 3, 8), floats(2, 4, 3), Tensor(np.array([1, 3])), "swiglu"),
    ),
    "attention in half precision": (
        "FlashAttentionScore",
        lambda: npu_ops.attention(half(1, 5, 4, 8), half(1, 5, 2, 8), half(1, 5, 2, 8), None),
    ),
}


def settled(call: Callable[[], Any]) -> None:
    """A missing kernel may show only when the result is used."""
    found = call()
    for x in found if isinstance(found, (tuple, list)) else [found]:
        x.asnumpy()


@pytest.mark.parametrize("name", list(CALLS))
def test_arguments_are_accepted(name: str) -> None:
    kernel, call = CALLS[name]
    with pytest.raises(RuntimeError, match=rf"{kernel}.*unregistered|[Uu]nsupported op \[{kernel}"):
        settled(call)


WRONG: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    "keyword": (TypeError, lambda: ops.auto_generate.grouped_matmul_v4([floats(4, 3)], [floats(2, 3, 5)], groups=ENDS)),
    "type": (TypeError, lambda: ops.moe_token_permute(floats(4, 3), [0, 1])),
    "arity": (TypeError, lambda: ops.rms_norm(floats(4, 6))),
    "shape": (RuntimeError, lambda: npu_kernels.rms_norm(floats(4, 6), floats(7), 1e-6)),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_arguments_are_told_from_a_missing_kernel(name: str) -> None:
    kind, call = WRONG[name]
    with pytest.raises(kind) as caught:
        settled(call)
    assert "unregistered" not in str(caught.value)


def test_moe_token_unpermute_has_the_parameters_we_pass() -> None:
    """Its shape inference fails alike for right and wrong arguments, so the signature is all that can be asked."""
    import inspect

    bound = inspect.signature(ops.moe_token_unpermute).bind("rows", "index", "weights")
    assert bound.arguments == {"permuted_tokens": "rows", "sorted_indices": "index", "probs": "weights"}


def test_limits_of_the_grouped_matmul_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="at most 1024 experts per rank"):
        npu_kernels.grouped_rows(floats(4, 3), floats(1025, 3, 5), ENDS)
    with pytest.raises(ValueError, match="widths up to 65535"):
        npu_kernels.grouped_rows(floats(4, 3), floats(2, 3, 65536), ENDS)
    with pytest.raises(ValueError, match="no float64"):
        npu_kernels.grouped_rows(floats(4, 3).astype(ms.float64), floats(2, 3, 5).astype(ms.float64), ENDS)


def test_float64_is_refused_on_npus() -> None:
    with pytest.raises(ValueError, match="choose dtype float32 or bfloat16 for ascend"):
        npu_ops.cast(floats(2), "float64")
