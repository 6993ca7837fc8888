"""What a GPU machine runs first: `python tests/bench/gpu_check.py [--out DIR]`.

Verification on every GPU world that fits (float64, float32, bfloat16), then the quick start on one GPU, losses beside
those of the host.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from twinmoe.moe_core.compose import load_config
from twinmoe.testing.processes import run_processes

CHECKS = (("float64", "standard"), ("float32", "quick"), ("bfloat16", "quick"))


def verify(world: int) -> list[dict[str, Any]]:
    """One row per dtype."""
    rows = []
    for dtype, level in CHECKS:
        start = time.perf_counter()
        found = run_processes(world, "twinmoe.moe_core.verify:run", {"level": level, "dtype": dtype}, "cuda", 200)
        row = {k: found[k] for k in ("cases", "passed", "failures", "worst_relative_error")}
        rows.append({"world": world, "dtype": dtype, **row, "seconds": time.perf_counter() - start})
        print(json.dumps({**rows[-1], "failures": rows[-1]["failures"][:4]}), flush=True)
    return rows


def quickstart(steps: int) -> dict[str, Any]:
    """Losses of the same file on the GPU and on the host."""
    config = load_config("quickstart", [f"train.steps={steps}", "train.save_every=0"]).model_dump(mode="json")
    losses, seconds = {}, {}
    for backend in ("cuda", "cpu"):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"configs": [config], "folder": folder}
            found = run_processes(1, "twinmoe.testing.end_to_end.targets:train", arguments, backend, 300)
        losses[backend], seconds[backend] = found["summaries"][0]["losses"], time.perf_counter() - start
    worst = max(abs(a / b - 1) for a, b in zip(losses["cuda"], losses["cpu"]))
    result = {"steps": steps, "largest_relative_difference": worst, "losses": losses, "seconds": seconds}
    print(json.dumps({k: v for k, v in result.items() if k != "losses"}), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    worlds = [w for w in (1, 2, 4, 8) if w <= torch.cuda.device_count()]
    report = {"card": torch.cuda.get_device_name(0), "torch": torch.__version__, "verify": [], "quickstart": None}
    for world in worlds:
        report["verify"] += verify(world)
    report["quickstart"] = quickstart(arguments.steps)
    if arguments.out:
        (arguments.out / "gpu_check.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
