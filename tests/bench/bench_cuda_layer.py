"""One GPU: is the routed expert layer right, how fast is it, and beside which peers? Run by hand:

python tests/bench/bench_cuda_layer.py --out DIR [--quick] [--cases B,D] [--peers dense,eager,compile,ours]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch_layer import dense_step, torch_moe
from twinmoe.cuda.kernels import experts, launch
from twinmoe.cuda.kernels.gather_sum import gather_sum
from twinmoe.cuda.kernels.grouping import route_rows

DEVICE, BF16 = "cuda", torch.bfloat16
BAND = 6e-3


@dataclass(frozen=True)
class Case:
    """Shape of a layer call and the skew of its routing."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    zipf: float = 0.0

    @property
    def flops(self) -> float:
        return 6.0 * self.tokens * self.top_k * self.width * self.hidden


CASES = {
    "A": Case(16384, 4096, 14336, 8, 2),
    "B": Case(32768, 2048, 768, 128, 8),
    "C": Case(16384, 7168, 2048, 64, 8),
    "D": Case(32768, 2048, 1024, 64, 8),
    "Bz": Case(32768, 2048, 768, 128, 8, zipf=1.0),
    "Dz": Case(32768, 2048, 1024, 64, 8, zipf=1.0),
}


def make(case: Case, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """(x, ids, weights, w_up, w_down, grad) with fresh random values."""
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=g, device=DEVICE, dtype=BF16) * std).requires_grad_()

    x = normal(case.tokens, case.width)
    w_up = normal(case.experts, case.width, 2 * case.hidden, std=scale * case.width**-0.5)
    w_down = normal(case.experts, case.hidden, case.width, std=scale * case.hidden**-0.5)
    load = torch.arange(1, case.experts + 1, device=DEVICE, dtype=torch.float32) ** -case.zipf
    load = load[torch.randperm(case.experts, generator=g, device=DEVICE)]
    noise = torch.empty(case.tokens, case.experts, device=DEVICE).exponential_(generator=g)
    ids = (load / noise).topk(case.top_k, dim=1).indices
    weights = torch.rand(case.tokens, case.top_k, generator=g, device=DEVICE) + 0.1
    weights = (weights / weights.sum(1, keepdim=True)).requires_grad_()
    return x, ids, weights, w_up, w_down, torch.randn(x.shape, generator=g, device=DEVICE, dtype=BF16)


def median_ms(fn: Callable[[], object], budget_s: float = 1.0) -> float:
    """Median of event-timed calls after a warm-up."""
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    repeats = max(5, min(40, int(budget_s / (time.perf_counter() - start))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        fn()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


# --- right first -----------------------------------------------------------------------------------
def reference(x, ids, weights, w_up, w_down):
    """Dense masked float32 layer: every expert on every token."""
    y = torch.zeros_like(x)
    for e in range(w_up.shape[0]):
        gate, up = (x @ w_up[e]).chunk(2, dim=-1)
        share = (weights * (ids == e)).sum(1, keepdim=True)
        y = y + share * ((torch.nn.functional.silu(gate) * up) @ w_down[e])
    return y


def gradients(layer: Callable[..., torch.Tensor], data: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """[y, dx, dweights, dw_up, dw_down]."""
    x, ids, weights, w_up, w_down, grad = data
    y = layer(x, ids, weights, w_up, w_down)
    return [y.detach(), *torch.autograd.grad(y, [x, weights, w_up, w_down], grad.to(y.dtype))]


def check_small(layer: Callable[..., torch.Tensor]) -> dict[str, list[float]]:
    """Relative L2 errors, balanced and skewed with empty experts; AssertionError past the band."""
    torch.backends.cuda.matmul.allow_tf32 = False
    result = {}
    for name, tokens, zipf in (("balanced", 512, 0.0), ("skewed", 509, 1.5)):
        x, ids, weights, w_up, w_down, grad = make(Case(tokens, 512, 256, 16, 4, zipf))
        if zipf:
            ids = ids % 13
            same = ids[:, :, None] == ids[:, None, :]
            ids = torch.where(same.tril(-1).any(2), -1, ids)
        poison = [torch.full((2**28,), float("nan"), device=DEVICE)]
        del poison
        data = (x, ids, weights, w_up, w_down, grad)
        wide = [t.detach().float().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in data]
        got, want = gradients(layer, data), gradients(reference, tuple(wide))
        again = gradients(layer, data)
        result[name] = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, want)]
        assert all(torch.equal(a, b) for a, b in zip(got, again)), f"{name}: two runs differ"
        assert max(result[name]) < BAND, f"{name}: relative errors {result[name]} exceed {BAND}"
        if zipf:
            assert got[3][13:].abs().max() == 0, "gradient of an empty expert is not zero"
    return result


def check_full(layer: Callable[..., torch.Tensor], case: Case) -> list[float]:
    """At full size: three tokens' outputs, and one expert's weight gradients, against float32."""
    data = make(case)
    x, ids, weights, w_up, w_down, grad = data
    got = gradients(layer, data)
    errors = []
    with torch.no_grad():
        for t in (0, case.tokens // 2, case.tokens - 1):
            want = torch.zeros(case.width, device=DEVICE)
            for k in range(case.top_k):
                e = int(ids[t, k])
                gate, up = (x[t].float() @ w_up[e].float()).chunk(2)
                want += weights[t, k] * ((torch.nn.functional.silu(gate) * up) @ w_down[e].float())
            errors.append(((got[0][t].float() - want).norm() / want.norm()).item())
        e = int(ids[0, 0])
        t, k = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[t].float() @ w_up[e].float()).chunk(2, dim=1)
        s = torch.sigmoid(gate)
        d = (grad[t].float() @ w_down[e].float().T) * weights[t, k][:, None]
        dh = torch.cat([d * up * (s + gate * s * (1 - s)), d * gate * s], dim=1)
        down = (gate * s * up).T @ (grad[t].float() * weights[t, k][:, None])
        for mine, want in ((got[3][e], x[t].float().T @ dh), (got[4][e], down)):
            errors.append(((mine.float() - want).norm() / want.norm()).item())
    return errors


# --- then fast -------------------------------------------------------------------------------------
def time_layer(layer: Callable[..., torch.Tensor], data: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Milliseconds forward and forward + backward; GiB saved between the passes and at peak."""
    x, ids, weights, w_up, w_down, grad = data
    leaves = [x, weights, w_up, w_down]

    def forward() -> None:
        with torch.no_grad():
            layer(x, ids, weights, w_up, w_down)

    def both() -> None:
        torch.autograd.grad(layer(x, ids, weights, w_up, w_down), leaves, grad)

    out = {"forward_ms": median_ms(forward), "both_ms": median_ms(both)}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = layer(x, ids, weights, w_up, w_down)
    out["saved_gib"] = (torch.cuda.memory_allocated() - before) / 2**30
    grads = torch.autograd.grad(y, leaves, grad)
    out["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    del y, grads
    return out


def time_dense(case: Case) -> dict[str, float]:
    """The two and six GEMMs of a dense layer with the same floating-point operations."""
    rows = case.tokens * case.top_k
    x, g = (torch.randn(rows, case.width, device=DEVICE, dtype=BF16) for _ in range(2))
    w_up = torch.randn(case.width, 2 * case.hidden, device=DEVICE, dtype=BF16) * case.width**-0.5
    w_down = torch.randn(case.hidden, case.width, device=DEVICE, dtype=BF16) * case.hidden**-0.5
    h = torch.randn(rows, 2 * case.hidden, device=DEVICE, dtype=BF16)
    act = torch.randn(rows, case.hidden, device=DEVICE, dtype=BF16)
    forward = median_ms(lambda: (x @ w_up, act @ w_down))
    both = median_ms(lambda: (x @ w_up, act @ w_down, dense_step(x, h, act, g, w_up, w_down)))
    return {"forward_ms": forward, "both_ms": both}


def time_kernels(case: Case, data: tuple[torch.Tensor, ...], on: launch.Card) -> dict[str, float]:
    """TFLOP/s of each kernel of ours (ms for those without products)."""
    x, ids, weights, w_up, w_down, grad = (t.detach() for t in data)
    routing = route_rows(ids, case.experts, on.schedule.block_m)
    rows = case.tokens * case.top_k
    third = case.flops / 3e9
    act, h = launch.up(x, w_up, routing, rows, True, True, on)
    assert h is not None
    down = launch.rows(act, w_down, routing.grouping, False, on)
    dh, _, _ = launch.activation_grad(grad, w_down, h, weights, routing, on)
    ms = {
        "up": (2, lambda: launch.up(x, w_up, routing, rows, True, False, on)),
        "up_save": (2, lambda: launch.up(x, w_up, routing, rows, True, True, on)),
        "down": (1, lambda: launch.rows(act, w_down, routing.grouping, False, on)),
        "act": (1, lambda: launch.activation_grad(grad, w_down, h, weights, routing, on)),
        "dx": (2, lambda: launch.rows(dh, w_up, routing.grouping, True, on)),
        "dw_up": (2, lambda: launch.weight_grad(x, dh, routing, "a", "up", on)),
        "dw_down": (1, lambda: launch.weight_grad(act, grad, routing, "b", "down", on)),
        "gather_sum_ms": (0, lambda: gather_sum(down, routing.position, weights)),
        "route_rows_ms": (0, lambda: route_rows(ids, case.experts, on.schedule.block_m)),
    }
    return {k: (n * third / median_ms(f, 0.3) if n else median_ms(f, 0.3)) for k, (n, f) in ms.items()}


def ceilings() -> dict[str, float]:
    """TFLOP/s of an 8192^3 product and TB/s of a copy."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
    big = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    return {
        "gemm_tflops": 2 * 8192**3 / 1e9 / median_ms(lambda: a @ b),
        "copy_tbs": 2 * big.numel() / 1e9 / median_ms(lambda: big.clone()),
    }


def run_case(name: str, peers: list[str]) -> dict[str, dict[str, float]]:
    """All peers on one case."""
    case = CASES[name]
    rows: dict[str, dict[str, float]] = {}
    layers = {"ours": experts.moe_mlp, "eager": torch_moe, "compile": torch.compile(torch_moe)}
    for peer in peers:
        torch.cuda.empty_cache()
        try:
            if peer == "dense":
                rows[peer] = time_dense(case)
            else:
                data = make(case)
                rows[peer] = time_layer(layers[peer], data)
                if peer == "ours":
                    rows["kernels"] = time_kernels(case, data, launch.card(torch.device(DEVICE, 0)))
                    del data
                    rows["errors"] = {str(i): e for i, e in enumerate(check_full(experts.moe_mlp, case))}
        except torch.OutOfMemoryError as error:
            rows[peer] = {"failed": float("nan")}
            print(name, peer, str(error)[:200])
        line = "  ".join(f"{k} {v:.3f}" for k, v in rows[peer].items())
        print(f"{name:3s} {peer:8s} {line}", flush=True)
        if peer == "ours" and "kernels" in rows:
            print("    kernels  " + "  ".join(f"{k} {v:.3g}" for k, v in rows["kernels"].items()))
            print("    errors   " + "  ".join(f"{v:.1e}" for v in rows["errors"].values()), flush=True)
    return rows


def main() -> None:
    """Check, time, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--quick", action="store_true", help="cases A, B, D without the compiled peer")
    parser.add_argument("--cases", default=None)
    parser.add_argument("--peers", default=None)
    args = parser.parse_args()
    cases = (args.cases or ("A,B,D,Bz" if args.quick else "A,B,C,D,Bz,Dz")).split(",")
    peers = (args.peers or ("dense,eager,ours" if args.quick else "dense,eager,compile,ours")).split(",")
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "ceilings": ceilings(), "small": check_small(experts.moe_mlp), "cases": {},
    }  # fmt: skip
    print(json.dumps({k: v for k, v in report.items() if k != "cases"}), flush=True)
    for name in cases:
        report["cases"][name] = run_case(name, peers)  # type: ignore[index]
        (args.out / "bench_cuda_layer.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
