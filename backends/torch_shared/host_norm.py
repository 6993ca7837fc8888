"""RMSNorm on the host as one step of the graph: three passes forward, six backward, one small tensor kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .host_rows import row_blocks


class _RmsNorm(torch.autograd.Function):
    """y = x s w with s = 1 / sqrt(mean(x^2) + eps). Saves x and s.

    dx = s (w dy - x s^2 mean(w dy x)), dw = sum over rows of dy x s.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_RD, wide = x.reshape(-1, x.shape[-1]), torch.promote_types(x.dtype, torch.float32)
        w, y = weight.to(wide), torch.empty_like(x_RD, memory_format=torch.contiguous_format)
        scale = torch.empty((x_RD.shape[0], 1), dtype=wide)
        for rows in row_blocks(x_RD):
            part = x_RD[rows].to(wide)
            torch.linalg.vector_norm(part, dim=-1, keepdim=True, out=scale[rows])
            scale[rows].square_().div_(part.shape[1]).add_(eps).rsqrt_()
            if y.dtype == wide:
                torch.mul(part, scale[rows], out=y[rows]).mul_(w)
            else:
                y[rows] = (part * scale[rows]).mul_(w)
        ctx.save_for_backward(x_RD, weight, scale)
        return y.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RD, weight, scale = ctx.saved_tensors
        w, d_x = weight.to(scale.dtype), torch.empty_like(x_RD, memory_format=torch.contiguous_format)
        d_w, d_RD = torch.zeros_like(w), grads[0].reshape(x_RD.shape)
        for rows in row_blocks(x_RD):
            x, d_y, s = x_RD[rows].to(w.dtype), d_RD[rows].to(w.dtype), scale[rows]
            product = d_y * x
            share = torch.mv(product, w)[:, None] * s * s / -x.shape[1]
            d_w += product.mul_(s).sum(0)
            d_x[rows] = torch.mul(d_y, w, out=product).addcmul_(x, share).mul_(s)
        return d_x.reshape(grads[0].shape), d_w.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return]
