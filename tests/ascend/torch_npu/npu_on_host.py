"""npu_* operators for CPU tensors under their recorded schemas, computing what their documentation says.

The Ascend code runs unchanged on top. Where the real library is loaded, its own schemas are used.
"""

from __future__ import annotations

import itertools
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCHEMAS: dict[str, str] = json.loads(Path(__file__).with_name("schemas.json").read_text())
STALE = math.nan
"""What a kernel leaves where nothing is promised."""


def grouped_matmul(x: list[Tensor], weight: list[Tensor], **options: Any) -> list[Tensor]:
    """One x, one weight, cumulative ends; group_type 0 cuts rows, 2 the summed axis. No derivative."""
    assert (options["split_item"], options.get("group_list_type", 0)) == (3, 0)
    ends = options["group_list"]
    assert ends.dtype == torch.int64
    rows, w = x[0] if options["group_type"] == 0 else x[0].t(), weight[0]
    assert rows.shape[0] > 0
    bounds = [0, *ends.tolist()]
    assert bounds[-1] == rows.shape[0], "the last end must be the number of rows"
    assert bounds == sorted(bounds)
    blocks = list(itertools.pairwise(bounds))
    if options["group_type"] == 0:
        return [torch.cat([rows[a:b] @ w[g] for g, (a, b) in enumerate(blocks)])]
    assert not x[0].is_contiguous() or min(x[0].shape) == 1, "the kernel takes x as a transposed view"
    dw = rows.new_full((len(blocks), rows.shape[1], w.shape[1]), STALE)
    for g, (a, b) in enumerate(blocks):
        if b > a:
            dw[g] = rows[a:b].t() @ w[a:b]
    return [dw]


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    assert input.numel() > 0, "empty tensors are not supported"
    assert input.is_contiguous(), "non-contiguous tensors are not supported"
    gate, up = input.chunk(2, dim)
    return F.silu(gate) * up


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
) -> Tensor:
    assert probs is not None
    assert sorted_indices.dtype == torch.int32
    assert permuted_tokens.dtype == probs.dtype
    picked = permuted_tokens[sorted_indices.long()].reshape(*probs.shape, -1)
    total = torch.zeros_like(picked[:, 0])
    for k in range(probs.shape[1]):
        total = total + picked[:, k] * probs[:, k : k + 1]
    return total


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert input.dtype == gamma.dtype
    inverse = torch.rsqrt((input * input).mean(-1, keepdim=True) + epsilon)
    return input * inverse * gamma, inverse


def fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: None = None,
    padding_mask: None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    *positions: Any,
    sparse_mode: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """The dispatcher hands over what differs from a default, in order up to the last such argument."""
    hidden, sparse_mode = atten_mask, positions[7] if len(positions) > 7 else sparse_mode
    assert hidden is not None
    assert input_layout == "BSND"
    assert head_num == query.shape[2]
    assert query.dtype in (torch.float16, torch.bfloat16)
    length = query.shape[1]
    if sparse_mode == 2:
        assert tuple(hidden.shape) == (2048, 2048)
        hidden = hidden[:length, :length]
    q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, -math.inf)
    y = (torch.softmax(scores, -1) @ v).transpose(1, 2).to(query.dtype)
    return y, y.detach(), y.detach(), y.detach(), 0, 0, 0


KERNELS = {
    "npu_grouped_matmul": grouped_matmul,
    "npu_swiglu": swiglu,
    "npu_moe_token_unpermute": unpermute,
    "npu_rms_norm": rms_norm,
    "npu_fusion_attention": fusion_attention,
}
DIFFERENTIABLE = ("npu_swiglu", "npu_rms_norm", "npu_fusion_attention")
"""What the real library differentiates and the Ascend code relies on."""


@lru_cache(maxsize=1)
def install() -> torch.library.Library:
    """Once per process; the library lives as long as the result."""
    library = torch.library.Library("npu", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.npu, name):
            library.define(schema)
        library.impl(name, KERNELS[name], "CPU")
        if name in DIFFERENTIABLE:
            library.impl(name, KERNELS[name], "AutogradCPU")
    return library
