"""`router_topk` on the kernels: scores never written, forward or backward; many heads in one launch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .gather_sum import gather_sum
from .router_kernels import choose_kernel, given_kernel

Precision = Literal["float32", "bf16_fp32acc"]
_CHUNK = 2**24
"""Scores whose gradient is dense at a time."""


@dataclass(frozen=True)
class Selection:
    """What is chosen: the k best of x @ w + bias."""

    k: int
    precision: Precision = "float32"


@dataclass(frozen=True)
class Blocks:
    """Tile sizes: tokens, experts, width."""

    bm: int = 128
    be: int = 128
    bk: int = 64
    warps: int = 8
    stages: int = 3


@dataclass(frozen=True)
class Specialised:
    """Hopper's warp-specialised kernel (`launch_router`) on so many multiprocessors, instead of `Blocks`."""

    programs: int


HOPPER = Blocks(bm=64, warps=4)
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
    fine = x_NHD.shape[2] % 64 == 0 and choice.k <= min(w_HDE.shape[2], 16) and x_NHD.shape[0] > 0
    return x_NHD.dtype == torch.bfloat16 and w_HDE.dtype != torch.float64 and fine


class RouterTopk(torch.autograd.Function):
    """(logits, ids) (N, H, k); the logits carry gradient to x and w."""

    @staticmethod
    def forward(ctx: Any, x, w, bias, given, choice: Selection, on: Blocks | Specialised):
        terms = split_weights(w, x.dtype, choice.precision)
        if given is None:
            logits, ids = _choose(x, terms, bias, w.shape[2], choice, on)
        else:
            logits, ids = _look_up(x, terms, given.contiguous(), w.shape[2], on), given.clone()
        ctx.save_for_backward(x, w, ids)
        ctx.choice = choice
        ctx.mark_non_differentiable(ids)
        return logits, ids

    @staticmethod
    def backward(ctx: Any, *grads):
        x, w, ids = ctx.saved_tensors
        grad = grads[0].to(torch.float32).contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _token_grad(w, ids, grad, x.dtype)
        if ctx.needs_input_grad[1]:
            dw = _router_grad(x, w, ids, grad, ctx.choice.precision)
        return dx, dw, None, None, None, None


def router_topk(
    x_NHD: torch.Tensor,
    w_HDE: torch.Tensor,
    bias_HE: torch.Tensor | None,
    choice: Selection,
    ids_NHK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits float32, ids int64), both (N, H, k): x @ w of the chosen, best first; ties go to the lower id.

    ids_NHK: these instead of the best; their logits have the bits that choosing them gave.
    """
    device = torch.cuda.get_device_properties(x_NHD.device)
    on = schedule_for(w_HDE.shape[2], device.major * 10 + device.minor, device.multi_processor_count)
    return RouterTopk.apply(x_NHD.contiguous(), w_HDE, bias_HE, ids_NHK, choice, on)  # type: ignore[return-value]


def schedule_for(experts: int, capability: int, programs: int) -> Blocks | Specialised:
    """The kernel of a compute capability (90 = Hopper) with so many multiprocessors."""
    if capability == 90 and experts > 64:
        return Specialised(programs)
    blocks = HOPPER if capability >= 90 else AMPERE
    return replace(blocks, be=64) if experts <= 64 else blocks


def _flat(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    flat = x.view(-1, x.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, columns])


def _choose(x, terms, bias, experts: int, choice: Selection, b: Blocks | Specialised):
    if isinstance(b, Specialised):
        from . import launch_router

        return launch_router.choose(x, terms, bias, experts, choice.k, b.programs)
    rows, heads, width = x.shape
    logits = torch.empty((rows, heads, choice.k), dtype=torch.float32, device=x.device)
    ids = torch.empty((rows, heads, choice.k), dtype=torch.int64, device=x.device)
    choose_kernel[(triton.cdiv(rows, b.bm), heads)](
        _flat(x.view(rows, heads * width), b.bm, b.bk), _flat(terms, b.bk, b.be),
        logits if bias is None else bias.contiguous(), logits, ids, rows, heads, width, experts,
        K=choice.k, SLOTS=max(2, triton.next_power_of_2(choice.k)), TERMS=terms.shape[0], BIASED=bias is not None,
        BM=b.bm, BE=b.be, BK=b.bk,
        num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return logits, ids


def _look_up(x, terms, ids, experts: int, b: Blocks | Specialised) -> torch.Tensor:
    if isinstance(b, Specialised):
        from . import launch_router

        return launch_router.look_up(x, terms, ids, experts, b.programs)
    rows, heads, width = x.shape
    logits, k = torch.empty(ids.shape, dtype=torch.float32, device=x.device), ids.shape[2]
    given_kernel[(triton.cdiv(rows, b.bm), heads)](
        _flat(x.view(rows, heads * width), b.bm, b.bk), _flat(terms, b.bk, b.be), logits, ids, rows, heads, width,
        experts, K=k, SLOTS=max(2, triton.next_power_of_2(k)), TERMS=terms.shape[0], BM=b.bm, BE=b.be, BK=b.bk,
        num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return logits


def _token_grad(w, ids, grad, dtype: torch.dtype) -> torch.Tensor:
    """dx[n] = sum over k of grad[n, k] * w[:, ids[n, k]], in float32: rows of w, transposed, lie in cache."""
    heads, width, experts = w.shape
    rows_of_w = w.to(torch.float32).transpose(1, 2).contiguous().view(heads * experts, width)
    position = ids + torch.arange(heads, device=ids.device)[None, :, None] * experts
    dx = gather_sum(rows_of_w, position.flatten(0, 1), grad.flatten(0, 1), dtype)
    return dx.view(ids.shape[0], heads, width)


def _router_grad(x, w, ids, grad, precision: Precision) -> torch.Tensor:
    """dw (H, D, E) = x^T @ (gradient of the scores), `_CHUNK` scores at a time, as one or two bfloat16 terms."""
    heads, _, experts = w.shape
    dw = torch.zeros(w.shape, dtype=torch.float32, device=w.device)
    step = max(1, _CHUNK // (heads * experts))
    for rows in (slice(first, first + step) for first in range(0, x.shape[0], step)):
        scores = torch.zeros((*ids[rows].shape[:2], experts), dtype=torch.float32, device=w.device)
        scores = scores.scatter_(2, ids[rows], grad[rows]).transpose(0, 1)
        x_HDN, high = x[rows].permute(1, 2, 0), scores.to(x.dtype)
        dw += _product(x_HDN, high)
        if precision == "float32" and x.dtype != torch.float32:
            dw += _product(x_HDN, (scores - high.to(torch.float32)).to(x.dtype))
    return dw.to(w.dtype)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)
