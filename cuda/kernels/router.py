"""`router_topk` on the kernels: scores never written, forward or backward; many heads in one launch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .router_kernels import choose_kernel, router_grad_kernel, token_grad_kernel

Precision = Literal["float32", "bf16_fp32acc"]


@dataclass(frozen=True)
class Selection:
    """What is chosen: k of f(x @ w) + bias, f = sigmoid or nothing, within the `keep` best of `groups` groups."""

    k: int
    sigmoid: bool = False
    groups: int = 1
    keep: int = 1
    precision: Precision = "float32"


@dataclass(frozen=True)
class Blocks:
    """Tile sizes: tokens, experts, width; bn: tokens a step of the weight gradient."""

    bm: int = 128
    be: int = 128
    bk: int = 64
    bn: int = 32
    warps: int = 8
    stages: int = 3


HOPPER = Blocks()
AMPERE = Blocks(bm=64, be=64, bk=32)


def split_weights(w_HDE: torch.Tensor, dtype: torch.dtype, precision: Precision) -> torch.Tensor:
    """(terms, H, D, E rounded up to 16): arrays of dtype whose sum is w: three of bfloat16 hold a float32."""
    heads, width, experts = w_HDE.shape
    terms = 1 if precision == "bf16_fp32acc" or dtype == torch.float32 else 3
    out = w_HDE.new_zeros((terms, heads, width, -(-experts // 16) * 16), dtype=dtype)
    rest = w_HDE.to(torch.float32)
    for term in out:
        term[..., :experts] = rest
        rest = rest - term[..., :experts]
    return out


def fits(x_NHD: torch.Tensor, w_HDE: torch.Tensor, choice: Selection) -> bool:
    """Whether the kernels take these shapes and dtypes: bfloat16 tokens (a float32 token is not split)."""
    experts = w_HDE.shape[2]
    grouped = choice.groups == 1 or (experts in (32, 64, 128, 256) and experts % choice.groups == 0)
    fine = x_NHD.shape[2] % 64 == 0 and choice.k <= min(experts, 16) and x_NHD.shape[0] > 0
    return x_NHD.dtype == torch.bfloat16 and w_HDE.dtype != torch.float64 and fine and grouped


class RouterTopk(torch.autograd.Function):
    """(logits, ids) (N, H, k); the logits carry gradient to x and w."""

    @staticmethod
    def forward(ctx: Any, x, w, bias, choice: Selection, blocks: Blocks):
        terms = split_weights(w, x.dtype, choice.precision)
        logits, ids = _choose(x, terms, bias, w.shape[2], choice, blocks)
        ctx.save_for_backward(x, w, ids)
        ctx.choice, ctx.blocks = choice, blocks
        ctx.mark_non_differentiable(ids)
        return logits, ids

    @staticmethod
    def backward(ctx: Any, *grads):
        x, w, ids = ctx.saved_tensors
        grad = grads[0].to(torch.float32).contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _token_grad(x, split_weights(w, x.dtype, ctx.choice.precision), ids, grad, w.shape[2], ctx.blocks)
        if ctx.needs_input_grad[1]:
            dw = _router_grad(x, w, ids, grad, ctx.choice, ctx.blocks)
        return dx, dw, None, None, None


def router_topk(
    x_NHD: torch.Tensor, w_HDE: torch.Tensor, bias_HE: torch.Tensor | None, choice: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits float32, ids int64), both (N, H, k): x @ w of the chosen, best first; ties go to the lower id."""
    major, minor = torch.cuda.get_device_capability(x_NHD.device)
    blocks = blocks_for(w_HDE.shape[2], choice, major * 10 + minor)
    return RouterTopk.apply(x_NHD.contiguous(), w_HDE, bias_HE, choice, blocks)  # type: ignore[return-value]


def blocks_for(experts: int, choice: Selection, capability: int) -> Blocks:
    """Tile sizes on a compute capability (90 = Hopper); a group limit needs all experts in one tile."""
    blocks = HOPPER if capability >= 90 else AMPERE
    if choice.groups > 1:
        return replace(blocks, bm=64 if capability >= 90 else 32, be=triton.next_power_of_2(experts))
    return replace(blocks, be=64) if experts <= 64 else blocks


def _flat(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    flat = x.view(-1, x.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, columns])


def _choose(x, terms, bias, experts: int, choice: Selection, b: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, width = x.shape
    logits = torch.empty((rows, heads, choice.k), dtype=torch.float32, device=x.device)
    ids = torch.empty((rows, heads, choice.k), dtype=torch.int64, device=x.device)
    choose_kernel[(triton.cdiv(rows, b.bm), heads)](
        _flat(x.view(rows, heads * width), b.bm, b.bk), _flat(terms, b.bk, b.be),
        logits if bias is None else bias.contiguous(), logits, ids, rows, heads, width, experts,
        K=choice.k, SLOTS=max(2, triton.next_power_of_2(choice.k)), TERMS=terms.shape[0], BIASED=bias is not None,
        SIGMOID=choice.sigmoid, GROUPS=choice.groups, KEEP=choice.keep, BM=b.bm, BE=b.be, BK=b.bk,
        num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return logits, ids


def _token_grad(x, terms, ids, grad, experts: int, b: Blocks) -> torch.Tensor:
    rows, heads, width = x.shape
    dx = torch.empty_like(x)
    bd = 64 if width % 128 else 128
    token_grad_kernel[(triton.cdiv(rows, b.bm), heads, triton.cdiv(width, bd))](
        _flat(terms, bd, b.bk), ids, grad, _flat(dx.view(rows, heads * width), b.bm, bd), rows, heads, width, experts,
        K=ids.shape[2], TERMS=terms.shape[0], BM=b.bm, BD=bd, BE=b.bk, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return dx


def _router_grad(x, w, ids, grad, choice: Selection, b: Blocks) -> torch.Tensor:
    rows, heads, width = x.shape
    experts = w.shape[2]
    bd = 64 if width % 128 else 128
    tiles = heads * triton.cdiv(width, bd) * triton.cdiv(experts, b.be)
    splits = max(1, min(256 // max(1, tiles), triton.cdiv(rows, 512)))
    span = triton.cdiv(triton.cdiv(rows, splits), b.bn) * b.bn
    partial = torch.empty((splits, heads, width, experts), dtype=torch.float32, device=x.device)
    terms = 1 if choice.precision == "bf16_fp32acc" or x.dtype == torch.float32 else 3
    router_grad_kernel[(splits, heads, triton.cdiv(width, bd) * triton.cdiv(experts, b.be))](
        _flat(x.view(rows, heads * width), b.bn, bd), ids, grad, partial, rows, heads, width, experts, span,
        K=ids.shape[2], TERMS=terms, BN=b.bn, BD=bd, BE=b.be, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return partial.sum(0).to(w.dtype)
