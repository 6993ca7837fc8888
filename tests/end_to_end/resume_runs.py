"""Short training runs that save, stop and go on somewhere else: the orders, and who carries them out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Launch
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.backends.registry import Backend, load
from twinmoe.moe_core.checkpoint import Checkpoint
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.shapes import declared
from twinmoe.moe_core.train import run
from twinmoe.testing.processes import PORTS_OF_A_JOB, run_processes

SAVED, STEPS = 2, 4
TINY: dict[str, Any] = {
    "model": {"hidden_size": 8, "num_layers": 2, "num_attention_heads": 2, "tie_embeddings": True},
    "moe": {"num_experts": 5, "top_k": 2, "expert_hidden_size": 8, "bias_update_rate": 0.01, "router_jitter": 0.01},
    "train": {
        "steps": STEPS,
        "save_every": SAVED,
        "keep_last": 9,
        "warmup_steps": 2,
        "dtype": "float64",
        "adam_eps": 1e-3,
        "global_batch_size": 4,
        "sequence_length": 12,
        "validation_batches": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.05,
        "health_every": 0,
    },
    "data": {"source": "text"},
}
EAGER = {"planner": "least_loaded", "least_loaded": {"min_rows": 1, "imbalance_threshold": "1"}}
MOVING = {"planner": "relayout", "slots_per_rank": 3, "relayout": {"skip_below": 0, "hysteresis": 0, "window": 2}}
PAIRS = {"name": "pairs", "levels": [{"name": "node", "size": 2}, {"name": "host"}]}
SWAP = {"placement": "swap", "swap": {"min_gain": 0, "objective": "load"}}

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "ep": {},
    "replicas": {"parallel": {"expert_parallel_size": 2}},
    "llep": {"parallel": {**EAGER, "residency": "borrowed"}},
    "llep_sharded": {"parallel": {**EAGER, "residency": "fully_sharded", "slots_per_rank": 3}},
    "laer": {"parallel": {**MOVING, "residency": "fully_sharded"}},
    "laer_borrowed": {"parallel": {**MOVING, "residency": "borrowed"}},
    "fsdp_ep": {"parallel": {"residency": "fully_sharded", "data_sharding": "full"}},
    "hiermoe": {"parallel": {**SWAP, "transport": "hierarchical_dedup"}, "cluster": PAIRS},
    "groupwise": {"parallel": {"tensor_parallel_size": 2, "transport": "groupwise"}},
    "accumulated": {"train": {"micro_batch_size": 1, "recompute": "layer"}},
}
"""Ways of running the one model."""

FEWEST_RANKS = {"replicas": 4, "groupwise": 2}


def layouts(ranks: int, backend: str = "cpu") -> list[str]:
    """Names of the layouts that so many ranks can have (the reference shards no dense parameters)."""
    possible = [name for name in LAYOUTS if ranks >= FEWEST_RANKS.get(name, 1)]
    return [name for name in possible if backend != "reference" or name != "fsdp_ep"]


def config(layout: str, text: Path, **train: Any) -> dict[str, Any]:
    """TINY under a layout, on the text."""
    merged = copy.deepcopy(TINY)
    for section, values in (*LAYOUTS[layout].items(), ("data", {"paths": [str(text)]}), ("train", train)):
        merged.setdefault(section, {}).update(values)
    return merged


def write_text(path: Path) -> Path:
    words = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls")
    path.write_text(" ".join(words[(i * i + i // 3) % len(words)] for i in range(2000)))
    return path


def order(layout: str, text: Path, run_dir: Path, resume: Path | None = None, **train: Any) -> dict[str, Any]:
    """One run of a job: train `layout` in run_dir, from `resume` on if there is one."""
    told = None if resume is None else str(resume)
    return {"config": config(layout, text, **train), "run_dir": str(run_dir), "resume": told}


def carry_out(backend: Backend, launch: Launch, orders: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs, one after the other, on this rank; their summaries."""
    summaries = []
    for number, one in enumerate(orders):
        folder = Path(one["run_dir"])
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        here = replace(launch, port=launch.port + number) if launch.size > 1 else launch
        summaries.append(run(Config.model_validate(one["config"]), backend, here, folder, one["resume"]))
    return {"summaries": summaries}


def job(backend: str, ranks: int, orders: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Summaries of all orders on `ranks` ranks of a backend: virtual ones, this process, or processes."""
    given = [dict(one) for one in orders]
    if backend == "reference":
        return [virtual(ranks, one) for one in given]
    if ranks == 1:
        return carry_out(load(backend), Launch(), given)["summaries"]
    target = "twinmoe.testing.end_to_end.resume_runs:carry_out"
    summaries = []
    for some in batched(given, PORTS_OF_A_JOB):  # torch keeps the port of a process's first run until it ends
        summaries += run_processes(ranks, target, {"orders": some}, backend, 600)["summaries"]
    return summaries


def batched(orders: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Runs of at most `size` orders."""
    for start in range(0, len(orders), size):
        yield orders[start : start + size]


def virtual(ranks: int, one: dict[str, Any]) -> dict[str, Any]:
    """One run on virtual ranks of the reference."""
    found = run_ranks(ranks, lambda comm: carry_out(load("reference"), Launch(comm.rank, ranks), [one]), 120)
    return found[0]["summaries"][0]


def whole_tensors(folder: Path, layout: str, text: Path) -> dict[tuple[str, str], np.ndarray]:
    """Everything in a checkpoint by logical name and kind, whatever wrote it."""
    checkpoint = Checkpoint(folder)
    found: dict[tuple[str, str], np.ndarray] = {}
    specs = {p.name: p for p in declared(Config.model_validate(config(layout, text)), Mesh())}
    for name, kind, value in checkpoint.values(specs):
        pieces = specs[name].pieces
        parts = zip([p.name for p in pieces], value, strict=True) if pieces else [(name, value)]
        found.update({(logical, kind): np.asarray(part) for logical, part in parts})
    return found
