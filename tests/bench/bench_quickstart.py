"""One training step on the host beside transformers' Qwen3-MoE: forward, backward, clipping, AdamW. Run by hand:

python tests/bench/bench_quickstart.py [--rounds 9] [--threads 1] [--shapes few,many] [--json]

Same sizes, weights, batch and losses; the models take turns step by step, medians are reported. Peak memory is the
resident set of a process of its own, above what it was before the model was built.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from twinmoe.backends import registry
from twinmoe.backends.host_memory import peak_resident
from twinmoe.backends.protocol import TrainOptions
from twinmoe.testing.end_to_end.qwen3_moe import EXPERTS, Ours, Shape, build_qwen3, qwen3_loss, random_batch

SHAPES = {"few": Shape(), "many": Shape(experts=64, top_k=8, hidden=64)}
OPTIONS = TrainOptions()
RATE, CLIP, WARM_UP = 1e-3, 1.0, 2

Step = Callable[[], float]


def our_step(shape: Shape) -> tuple[Step, Ours]:
    """A step of ours; it returns the loss."""
    ours = Ours.build(registry.load("cpu"), shape, OPTIONS)
    batch, trainer = random_batch(shape), ours.backend.trainer

    def step() -> float:
        loss = ours.forward_backward(batch)
        trainer.reduce_gradients(ours.state)
        trainer.clip_gradients(ours.state, CLIP)
        trainer.step(ours.state, RATE)
        return float(loss)

    return step, ours


def their_step(shape: Shape, values: Any, experts: str) -> Step:
    """A step of transformers' model with torch's own clipping and fused AdamW."""
    model, batch = build_qwen3(shape, values, experts), random_batch(shape)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIONS.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (OPTIONS.beta1, OPTIONS.beta2)
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=betas, eps=OPTIONS.eps, fused=True)

    def step() -> float:
        loss = qwen3_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def in_turn(steps: dict[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step, (elapsed, of the processor), interleaved.

    AssertionError if losses part: then the models do not compute the same.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(rounds + WARM_UP):
        losses = {}
        for name, step in steps.items():
            start, busy = time.perf_counter(), time.process_time()
            losses[name] = step()
            seconds[name].append((time.perf_counter() - start, time.process_time() - busy))
        spread = max(losses.values()) / min(losses.values()) - 1
        assert turn > 2 or spread < 1e-4, f"the models disagree in step {turn}: {losses}"
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def memory(name: str, shape_name: str) -> int:
    """Peak bytes of one contender, measured in a process of its own."""
    words = [sys.executable, "-W", "ignore", __file__, "--shapes", shape_name, "--memory", name]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def measure_memory(name: str, shape: Shape) -> int:
    """In that process: bytes above those before the build, over three steps."""
    warm = our_step(Shape(width=32, hidden=16, layers=1, sequences=1, length=16))[0]
    warm()
    if name == "twinmoe":
        before = resident()
        step = our_step(shape)[0]
    else:
        values = our_step(shape)[1].values()
        before = resident()
        step = their_step(shape, values, name)
    peak_resident(reset=True)
    for _ in range(3):
        step()
    return peak_resident() - before


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(shape_name: str, rounds: int) -> list[dict[str, Any]]:
    """One row a contender."""
    shape = SHAPES[shape_name]
    step, ours = our_step(shape)
    values = ours.values()
    steps = {"twinmoe": step, **{name: their_step(shape, values, name) for name in EXPERTS}}
    seconds = in_turn(steps, rounds)
    elapsed = {name: statistics.median(wall for wall, _ in taken) for name, taken in seconds.items()}
    processor = {name: statistics.median(busy for _, busy in taken) for name, taken in seconds.items()}
    return [
        {
            "shape": shape_name,
            "experts": shape.experts,
            "top_k": shape.top_k,
            "parameters": sum(value.size for value in values.values()),
            "model": name,
            "milliseconds": 1e3 * elapsed[name],
            "least": 1e3 * min(wall for wall, _ in taken),
            "most": 1e3 * max(wall for wall, _ in taken),
            "processor_milliseconds": 1e3 * processor[name],
            "speedup": min(elapsed[peer] for peer in EXPERTS) / elapsed[name],
            "processor_speedup": min(processor[peer] for peer in EXPERTS) / processor[name],
            "peak_memory_bytes": memory(name, shape_name),
        }
        for name, taken in seconds.items()
    ]


def show(row: dict[str, Any]) -> str:
    return (
        f"{row['experts']:3} experts top-{row['top_k']}  {row['parameters'] / 1e6:5.1f} M  {row['model']:10}"
        f"{row['milliseconds']:8.1f} ms ({row['least']:.1f} to {row['most']:.1f}; "
        f"{row['processor_milliseconds']:.1f} of the processor)  {row['speedup']:5.2f} x the faster peer "
        f"({row['processor_speedup']:.2f})  {row['peak_memory_bytes'] / 2**20:7.1f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    shapes = words.shapes.split(",")
    if words.memory:
        print(measure_memory(words.memory, SHAPES[shapes[0]]))
        return
    import transformers

    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    head = {"date": str(date.today()), "threads": words.threads, "load": os.getloadavg()[0], **versions}
    rows = [row for name in shapes for row in measure(name, words.rounds)]
    if words.json:
        print(json.dumps({**head, "rows": rows}))
        return
    print(*(f"{key} {value}" for key, value in head.items()), sep=", ")
    print(*map(show, rows), sep="\n")


if __name__ == "__main__":
    main()
