"""One GPU: is the router right, how often does rounding flip a choice, how fast is it? Run by hand:

python tests/bench/bench_cuda_router.py --out DIR
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from bench_cuda_layer import median_ms
from twinmoe.cuda.kernels.router import Precision, Selection, router_topk

DEVICE, BF16 = "cuda", torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Routers of one call."""

    tokens: int
    heads: int
    width: int
    experts: int
    top_k: int


SHAPES = (Shape(32768, 1, 2048, 128, 8), Shape(32768, 1, 2048, 1024, 8), Shape(32768, 16, 128, 256, 8))


def make(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x bfloat16, w float32, bias, grad) with fresh random values."""
    x = torch.randn(shape.tokens, shape.heads, shape.width, device=DEVICE, dtype=BF16).requires_grad_()
    w = (torch.randn(shape.heads, shape.width, shape.experts, device=DEVICE) * shape.width**-0.5).requires_grad_()
    bias = 0.1 * torch.randn(shape.heads, shape.experts, device=DEVICE)
    return x, w, bias, torch.randn(shape.tokens, shape.heads, shape.top_k, device=DEVICE)


def plain(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch in bfloat16: product, top-k, chosen logits."""
    logits = torch.einsum("nhd,hde->nhe", x, w.to(x.dtype)).float()
    ids = (logits + bias).topk(k, dim=-1).indices
    return torch.gather(logits, 2, ids), ids


def check(shape: Shape, precision: Precision) -> dict[str, float]:
    """Against float64 on the first 2,048 tokens: share of flipped choices; relative errors of logits, dx, dw."""
    x, w, bias, grad = make(shape)
    logits, ids = router_topk(x, w, bias, Selection(shape.top_k, precision=precision))
    again = router_topk(x, w, bias, Selection(shape.top_k, precision=precision))
    assert torch.equal(ids, again[1]), "two runs chose differently"
    assert torch.equal(logits, again[0]), "two runs differ"
    head = slice(0, 2048)
    exact = torch.einsum("nhd,hde->nhe", x[head].double(), w.double())
    best = (exact + bias).sort(dim=-1, descending=True, stable=True).indices[..., : shape.top_k]
    flips = (ids[head].sort(-1).values != best.sort(-1).values).any(-1).float().mean().item()
    picked = torch.gather(exact, 2, ids[head])
    got = torch.autograd.grad(logits, [x, w], grad)
    spread = torch.zeros(shape.tokens, shape.heads, shape.experts, device=DEVICE).scatter_(2, ids, grad)
    want = (torch.einsum("nhe,hde->nhd", spread, w), torch.einsum("nhd,nhe->hde", x.float(), spread))
    pairs = [(logits[head], picked), *zip(got, want, strict=True)]
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]
    return {"flipped_tokens": flips, "logits": errors[0], "dx": errors[1], "dw": errors[2]}


def measure(shape: Shape, precision: Precision | None) -> dict[str, float]:
    """Milliseconds of choosing and of choosing + gradients; None: torch."""
    x, w, bias, grad = make(shape)

    def call() -> torch.Tensor:
        if precision is None:
            return plain(x, w, bias, shape.top_k)[0]
        return router_topk(x, w, bias, Selection(shape.top_k, precision=precision))[0]

    def forward() -> None:
        with torch.no_grad():
            call()

    return {
        "forward_ms": median_ms(forward, 0.3),
        "both_ms": median_ms(lambda: torch.autograd.grad(call(), [x, w], grad), 0.3),
    }


def main() -> None:
    """Check and time each shape and precision; print a line each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for shape in SHAPES:
        for precision in (*get_args(Precision), None):
            row = {"shape": str(shape), "precision": precision or "torch bfloat16", **measure(shape, precision)}
            row |= check(shape, precision) if precision else {}
            rows.append(row)
            print("  ".join(f"{v:.3g}" if isinstance(v, float) else v for v in row.values()), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bench_cuda_router.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
