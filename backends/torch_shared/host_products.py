"""Runs of rows times matrices on the host, by the faster of torch's two libraries.

torch multiplies float32 matrices with MKL, whose AVX-512 kernels are for Intel's processors alone; on others oneDNN,
which torch also carries, is about twice as fast. It compiles kernels for every shape and keeps them, about a megabyte
each, so it is given few numbers of rows (WIDTHS). The rest of a run is MKL's, unless it is long and neighbouring rows
widen it; their results are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDTHS = (64, 128, 192, 256, 512)
STEP = WIDTHS[0]
SHORT = 24
"""A rest of so many rows is faster in MKL than widened to STEP."""
NARROW = 32
"""Matrices with fewer rows or columns are MKL's."""

_one_dnn: Any = torch.ops.mkldnn


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, counts_G: Tensor) -> Tensor:
        ctx.runs = runs_of(x, w, counts_G)
        ctx.save_for_backward(x, w)
        return products(x, w, ctx.runs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        d_x = products(grads[0], w.transpose(1, 2), ctx.runs) if ctx.needs_input_grad[0] else None
        return d_x, outer_products(x, grads[0], ctx.runs, w) if ctx.needs_input_grad[1] else None, None


def grouped_matmul(x_ND: Tensor, w_GDF: Tensor, counts_G: Tensor) -> Tensor:
    return _GroupedMatmul.apply(x_ND, w_GDF, counts_G)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Runs:
    """How rows fall into groups. sizes: rows of each group, then those after the last; pieces: what oneDNN takes.

    A piece (group, first, rows, start, width): rows first.. are part of the width rows from start on that are
    multiplied. rests: (group, first, rows) for MKL.
    """

    sizes: tuple[int, ...]
    pieces: tuple[tuple[int, int, int, int, int], ...] = ()
    rests: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, counts_G: Tensor, num_rows: int, one_dnn: bool) -> Runs:
        """AssertionError if the counts exceed the rows."""
        sizes = counts_G.tolist()
        rest = num_rows - sum(sizes)
        assert rest >= 0, "counts exceed the rows"
        pieces, rests, first = [], [], 0
        for group, rows in enumerate(sizes):
            last = first + rows
            while one_dnn and last - first > SHORT:
                width = _width(last - first + STEP - SHORT - 1)
                start = min(first, num_rows - width)
                if start < 0:
                    break
                pieces.append((group, first, min(width, last - first), start, width))
                first += pieces[-1][2]
            if first < last:
                rests.append((group, first, last - first))
            first = last
        return cls((*sizes, rest), tuple(pieces), tuple(rests))


def runs_of(x_ND: Tensor, w_GDF: Tensor, counts_G: Tensor) -> Runs:
    """The runs of rows that meet these matrices."""
    fits = x_ND.dtype == w_GDF.dtype == torch.float32 and min(w_GDF.shape[1:]) >= NARROW
    return Runs.of(counts_G, x_ND.shape[0], fits and one_dnn_is_faster())


def products(x_ND: Tensor, w_GDF: Tensor, runs: Runs) -> Tensor:
    """Runs of rows times their group's matrix (G, D, F); rows after the last run are zero."""
    y = x_ND.new_empty((x_ND.shape[0], w_GDF.shape[2]))
    if runs.pieces:
        x_ND, w_GFD = x_ND.contiguous(), w_GDF.transpose(1, 2).unbind()
        for group, first, rows, start, width in runs.pieces:
            wide = _one_dnn_product(x_ND.narrow(0, start, width), w_GFD[group])
            y.narrow(0, first, rows).copy_(wide if rows == width else wide.narrow(0, first - start, rows))
    w = w_GDF.unbind()
    for group, first, rows in runs.rests:
        torch.mm(x_ND.narrow(0, first, rows), w[group], out=y.narrow(0, first, rows))
    y[x_ND.shape[0] - runs.sizes[-1] :].zero_()
    return y


def outer_products(x_ND: Tensor, d_NF: Tensor, runs: Runs, w_GDF: Tensor) -> Tensor:
    """Gradient of the matrices (G, D, F): x^T d of each run, exact zeros for an empty one."""
    d_w = torch.empty_like(w_GDF, memory_format=torch.contiguous_format)
    parts = zip(x_ND.t().split(runs.sizes, 1), d_NF.t().split(runs.sizes, 1), d_w.unbind())
    for x, d, out in parts:
        rows, first = x.shape[1], 0
        while runs.pieces and rows - first >= STEP:
            width = _width(rows - first)
            part = _one_dnn_product(x.narrow(1, first, width), d.narrow(1, first, width))
            out.add_(part) if first else out.copy_(part)
            first += width
        if first:
            out.addmm_(x[:, first:], d[:, first:].t())
        else:
            torch.mm(x, d.t(), out=out)
    return d_w


def _width(rows: int) -> int:
    """The largest width that fits."""
    return max(width for width in WIDTHS if width <= rows)


def _one_dnn_product(a_ND: Tensor, w_FD: Tensor) -> Tensor:
    """a w^T."""
    return _one_dnn._linear_pointwise(a_ND, w_FD, None, "none", [], "")


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
