"""The operations of `ascend`, with the kernels that the host lacks replaced by what their documentation says.

Everything around those kernels (guards, padding, gradients, dtypes) is the code that runs on an NPU.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast as typed

import mindspore as ms
import numpy as np
from mindspore import Tensor
from twinmoe.ascend.mindspore import host_rows, npu_ops, ops
from twinmoe.ascend.mindspore.npu_combine import Combine
from twinmoe.ascend.mindspore.npu_experts import Experts, Kernels
from twinmoe.backends import streaming
from twinmoe.backends.protocol import Ops

STALE = math.nan
"""What a kernel leaves where nothing is promised."""


def grouped_rows(x_ND: Tensor, w_GDF: Tensor, ends_G: Tensor) -> Tensor:
    """GroupedMatmulV4, group_type 0 with cumulative ends: the last end must be the number of rows."""
    x, w, ends = x_ND.asnumpy(), w_GDF.asnumpy(), ends_G.asnumpy()
    assert ends.dtype == np.int64
    assert len(x) > 0
    assert ends[-1] == len(x)
    assert (np.diff(ends) >= 0).all()
    starts = np.concatenate([[0], ends[:-1]])
    return Tensor.from_numpy(np.concatenate([x[a:b] @ w[g] for g, (a, b) in enumerate(zip(starts, ends, strict=True))]))


def grouped_weights(x_ND: Tensor, g_NF: Tensor, ends_G: Tensor) -> Tensor:
    """GroupedMatmulV4, group_type 2; nothing is promised for a group without rows."""
    x, g, ends = x_ND.asnumpy(), g_NF.asnumpy(), ends_G.asnumpy()
    assert ends[-1] == len(x)
    dw = np.full((len(ends), x.shape[1], g.shape[1]), STALE, x.dtype)
    for group, (a, b) in enumerate(zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)):
        if b > a:
            dw[group] = x[a:b].T @ g[a:b]
    return Tensor.from_numpy(dw)


def swiglu(h: Tensor) -> Tensor:
    """Empty tensors are not supported."""
    assert h.size > 0
    gate, up = ms.mint.chunk(h, 2, -1)
    return gate * ms.mint.sigmoid(gate) * up


def unpermute(rows_ND: Tensor, index_N: Tensor, weights_TK: Tensor) -> Tensor:
    """Indices in range, one dtype."""
    rows, index, weights = rows_ND.asnumpy(), index_N.asnumpy(), weights_TK.asnumpy()
    assert index.dtype == np.int32
    assert rows.dtype == weights.dtype
    assert ((index >= 0) & (index < len(rows))).all()
    picked = rows[index].reshape(*weights.shape, -1)
    total = np.zeros((len(weights), rows.shape[1]), rows.dtype)
    for k in range(weights.shape[1]):
        total += picked[:, k] * weights[:, k : k + 1]
    return Tensor.from_numpy(total)


def make() -> Ops:
    """`npu_ops` over these kernels; float64 allowed, which only the cast refuses on an NPU."""
    experts = Experts(Kernels(grouped_rows, grouped_weights, swiglu))
    own = {name: getattr(npu_ops, name) for name in npu_ops.__all__}
    own |= {
        "argsort": host_rows.argsort,
        "cast": ops.cast,
        "combine_rows": Combine(unpermute).combine_rows,
        "expert_mlp": experts.expert_mlp,
        "grouped_matmul": experts.grouped_matmul,
        "rms_norm": ops.rms_norm,
    }
    offered = typed(Ops, SimpleNamespace(**own))
    own["router_topk"] = lambda *args: streaming.router_topk(offered, *args)
    return typed(Ops, SimpleNamespace(**own))
