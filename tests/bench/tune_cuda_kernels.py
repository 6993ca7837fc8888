"""Which tile or ring suits each expert kernel on this card? Run by hand; its answers go into cuda/kernels/config.py:

    python tests/bench/tune_cuda_kernels.py --out DIR [--cases B,A] [--kernels up,act]

Variants are compiled and checked at a small size by worker processes, then timed at full size in this one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bench_cuda_layer import CASES, Case, make, median_ms
from twinmoe.cuda.kernels import launch
from twinmoe.cuda.kernels.config import HOPPER, Ring, Rings, Tile
from twinmoe.cuda.kernels.grouping import route_rows

SMALL = Case(640, 256, 256, 4, 2)
Variant = Tile | Ring


def row_tiles(
    columns: tuple[tuple[int, int, int], ...], stages: tuple[int, ...], pieces: tuple[int, ...]
) -> list[Tile]:
    """Tiles of 128 rows: (columns, warps, programs per multiprocessor) x stages x pieces x flattened or not."""
    return [
        Tile(128, bn, 64, warps, s, per_sm=per_sm, pieces=p, flatten=f)
        for bn, warps, per_sm in columns
        for s in stages
        for p in pieces
        for f in (True, False)
    ]


WIDE, PAIR = (256, 8, 1), (128, 4, 2)
VARIANTS: dict[str, list[Tile]] = {
    "up": row_tiles(((128, 8, 1),), (3, 4), (1, 2, 4))
    + row_tiles(((64, 4, 2),), (3,), (2, 4))
    + [Tile(128, 128, 64, 8, 3, group=g, pieces=2) for g in (1, 4, 16)],
    "down": row_tiles((WIDE,), (3, 4), (2, 4))
    + row_tiles((PAIR,), (3,), (4,))
    + [Tile(128, 256, 64, 8, 3, group=g, pieces=2) for g in (1, 4, 16)],
    "act": row_tiles(((128, 8, 1),), (3, 4), (4, 8))
    + row_tiles((WIDE,), (3,), (8,))
    + row_tiles((PAIR,), (3,), (8,))
    + [Tile(128, 256, 64, 8, 3, group=g, pieces=8) for g in (4, 16)],
    "dx": row_tiles((WIDE,), (3, 4), (2, 4)) + row_tiles((PAIR,), (3,), (4,)),
    "dw_up": [
        Tile(bm, bn, 64, warps, s, group=g, per_sm=per_sm, flatten=False)
        for bm, bn, warps, per_sm, stages in (
            (128, 256, 8, 1, (5, 7)), (256, 128, 8, 1, (5, 7)), (128, 128, 4, 2, (5,)), (128, 128, 8, 1, (7, 9)),
        )
        for s in stages
        for g in (4, 8)
    ],
}  # fmt: skip
VARIANTS["dw_down"] = VARIANTS["dw_up"]
RINGS: dict[str, list[Ring]] = {
    kernel: [replace(getattr(HOPPER.rings, kernel), group=group) for group in (2, 4, 8, 16, 32)] for kernel in VARIANTS
}


def calls(kernel: str, case: Case, on: launch.Card) -> tuple[float, Callable[[launch.Card], torch.Tensor]]:
    """(floating-point operations, call(card) -> its result) of a kernel on a case."""
    x, ids, weights, w_up, w_down, grad = (t.detach() for t in make(case))
    routing = route_rows(ids, case.experts, 128)
    rows = case.tokens * case.top_k
    act, h = launch.up(x, w_up, routing, rows, True, True, on)
    assert h is not None
    dh, _, _ = launch.activation_grad(grad, w_down, h, weights, routing, on)
    grouping = routing.grouping
    table: dict[str, tuple[int, Callable[[launch.Card], Any]]] = {
        "up": (2, lambda c: launch.up(x, w_up, routing, rows, True, True, c)[1]),
        "down": (1, lambda c: launch.rows(act, w_down, grouping, False, c)),
        "act": (1, lambda c: launch.activation_grad(grad, w_down, h, weights, routing, c)[0]),
        "dx": (2, lambda c: launch.rows(dh, w_up, grouping, True, c)),
        "dw_up": (2, lambda c: launch.weight_grad(x, dh, routing, "a", "up", c)),
        "dw_down": (1, lambda c: launch.weight_grad(act, grad, routing, "b", "down", c)),
    }
    thirds, fn = table[kernel]
    return thirds * case.flops / 3, fn


def with_variant(on: launch.Card, kernel: str, variant: Variant) -> launch.Card:
    schedule = on.schedule
    if isinstance(variant, Tile):
        return replace(on, schedule=replace(schedule, **{kernel: variant, "rings": Rings()}))
    return replace(on, schedule=replace(schedule, rings=replace(schedule.rings, **{kernel: variant})))


def small_check(job: tuple[str, Variant]) -> float:
    """Relative difference from the default tile at a small size; infinite if it does not compile."""
    kernel, variant = job
    on = launch.card(torch.device("cuda", 0))
    on = replace(on, schedule=replace(on.schedule, rings=Rings()))
    _, fn = calls(kernel, SMALL, on)
    want = fn(on).float()
    try:
        got = fn(with_variant(on, kernel, variant)).float()
        return float((got - want).norm() / want.norm())
    except Exception as error:
        print(kernel, variant, str(error)[:120], flush=True)
        return float("inf")


def main() -> None:
    """Compile and check in parallel, time in turn, print the best first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--cases", default="B,A")
    parser.add_argument("--kernels", default=",".join(VARIANTS))
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--variants", default="tiles,rings")
    args = parser.parse_args()
    tables = [{"tiles": VARIANTS, "rings": RINGS}[name] for name in args.variants.split(",")]
    jobs = [(kernel, variant) for kernel in args.kernels.split(",") for table in tables for variant in table[kernel]]
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        errors = dict(zip(range(len(jobs)), pool.map(small_check, jobs)))
    on = launch.card(torch.device("cuda", 0))
    results = []
    for name in args.cases.split(","):
        for kernel in args.kernels.split(","):
            flops, fn = calls(kernel, CASES[name], on)
            rows = []
            for i, (k, variant) in enumerate(jobs):
                if k == kernel and errors[i] < 1e-2:
                    ms = median_ms(lambda: fn(with_variant(on, k, variant)), 0.15)  # noqa: B023
                    rows.append({"case": name, "kernel": k, "tflops": flops / ms / 1e9, **asdict(variant)})
                elif k == kernel:
                    print(f"{name} {kernel} {variant} error {errors[i]:.1e}")
            rows.sort(key=lambda r: -r["tflops"])
            for row in rows[:6] + rows[-1:]:
                print("  ".join(f"{v:.0f}" if k == "tflops" else str(v) for k, v in row.items()), flush=True)
            results += rows
            torch.cuda.empty_cache()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tune_cuda_kernels.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
