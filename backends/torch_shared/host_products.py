"""Runs of rows times matrices on the host, by the faster of torch's two libraries.

torch multiplies float32 matrices with MKL, whose AVX-512 kernels are for Intel's processors alone; on others oneDNN,
which torch also carries, is about twice as fast. It compiles kernels for every shape and keeps them, half a megabyte
each, so it is given few numbers of rows: multiples of STEP up to MOST. The rest of a run is MKL's, unless it is long
and neighbouring rows widen it; their results are dropped.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEP, MOST = 64, 512
SHORT = 24
"""A rest of so many rows is faster in MKL than widened to STEP."""
NARROW = 32
"""Matrices with fewer rows or columns are MKL's."""

_one_dnn: Any = torch.ops.mkldnn


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, counts_G: Tensor) -> Tensor:
        ctx.sizes = run_sizes(counts_G, x.shape[0])
        ctx.save_for_backward(x, w)
        return products(x, w, ctx.sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        d_x = products(grads[0], w.transpose(1, 2), ctx.sizes) if ctx.needs_input_grad[0] else None
        return d_x, outer_products(x, grads[0], ctx.sizes, w) if ctx.needs_input_grad[1] else None, None


def grouped_matmul(x_ND: Tensor, w_GDF: Tensor, counts_G: Tensor) -> Tensor:
    return _GroupedMatmul.apply(x_ND, w_GDF, counts_G)  # type: ignore[no-any-return]


def run_sizes(counts_G: Tensor, num_rows: int) -> list[int]:
    """Rows of each group, then those after the last."""
    sizes = counts_G.tolist()
    rest = num_rows - sum(sizes)
    assert rest >= 0, "counts exceed the rows"
    return [*sizes, rest]


def products(x_ND: Tensor, w_GDF: Tensor, sizes: list[int]) -> Tensor:
    """Runs of rows times their group's matrix (G, D, F); rows after the last run are zero."""
    y = x_ND.new_empty((x_ND.shape[0], w_GDF.shape[2]))
    fast = _fits_one_dnn(x_ND, w_GDF)
    x_ND = x_ND.contiguous() if fast else x_ND
    first = 0
    for rows, w in zip(sizes, w_GDF.unbind()):
        last = first + rows
        if fast and rows > SHORT:
            first = _product_in_pieces(x_ND, w, y, first, last)
        if first < last:
            torch.mm(x_ND[first:last], w, out=y[first:last])
        first = last
    y[first:].zero_()
    return y


def _product_in_pieces(x_ND: Tensor, w: Tensor, y: Tensor, first: int, last: int) -> int:
    """Write y for rows first..last; returns where it stopped: what is left is short."""
    while last - first > SHORT:
        width = min(MOST, (last - first + STEP - SHORT - 1) // STEP * STEP)
        start = min(first, x_ND.shape[0] - width)
        if start < 0:
            break
        done = min(last, first + width)
        y[first:done] = _one_dnn_product(x_ND[start : start + width], w)[first - start : done - start]
        first = done
    return first


def outer_products(x_ND: Tensor, d_NF: Tensor, sizes: list[int], w_GDF: Tensor) -> Tensor:
    """Gradient of the matrices (G, D, F): x^T d of each run, exact zeros for an empty one."""
    d_w = torch.empty_like(w_GDF, memory_format=torch.contiguous_format)
    fast = _fits_one_dnn(x_ND, w_GDF)
    for x, d, out in zip(x_ND.split(sizes), d_NF.split(sizes), d_w.unbind()):
        if fast and x.shape[0] >= STEP:
            _outer_product_in_pieces(x, d, out)
        elif x.shape[0]:
            torch.mm(x.t(), d, out=out)
        else:
            out.zero_()
    return d_w


def _outer_product_in_pieces(x: Tensor, d: Tensor, out: Tensor) -> None:
    rows, first = x.shape[0], 0
    while rows - first >= STEP:
        last = first + min(MOST, (rows - first) // STEP * STEP)
        part = _one_dnn_product(x[first:last].t(), d[first:last])
        out.add_(part) if first else out.copy_(part)
        first = last
    if first < rows:
        out.addmm_(x[first:].t(), d[first:])


def _one_dnn_product(a: Tensor, b: Tensor) -> Tensor:
    return _one_dnn._linear_pointwise(a, b.t(), None, "none", [], "")


def _fits_one_dnn(x: Tensor, w_GDF: Tensor) -> bool:
    return x.dtype == w_GDF.dtype == torch.float32 and min(w_GDF.shape[1:]) >= NARROW and one_dnn_is_faster()


@lru_cache(maxsize=1)
def one_dnn_is_faster() -> bool:
    """Whether MKL runs this x86 processor below its vector width: AVX-512, and another maker than Intel."""
    if not torch.backends.mkldnn.is_available() or not hasattr(_one_dnn, "_linear_pointwise"):
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    try:
        makers = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id")]
    except OSError:
        return False
    return bool(makers) and "GenuineIntel" not in makers[0]
