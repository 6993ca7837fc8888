"""Run folders as a training leaves them, made of numbers that a test knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinmoe.moe_core.compose import dump, load_config
from twinmoe.moe_core.metrics import METRICS
from twinmoe.moe_core.run_folder import CONFIG, ENVIRONMENT, SUMMARY, config_hash, model_hash

LAYERS, EXPERTS = 2, 4
WORDS = (
    "model.hidden_size=16",
    f"model.num_layers={LAYERS}",
    f"moe.num_experts={EXPERTS}",
    "moe.expert_hidden_size=16",
    "train.validate_every=4",
)


def record(step: int, seconds: float = 0.5, **changes: Any) -> dict[str, Any]:
    """A step's record: 64 tokens, of which the first expert gets more and more."""
    load = [[16 + step, 16, 16, max(0, 16 - step)], [16, 16, 16, 16]]
    made = {
        "step": step,
        "loss": 5.0 - 0.1 * step,
        "tokens": 64,
        "seconds": seconds,
        "tokens_per_second": 64 / seconds,
        "phases": {"data": 0.1 * seconds, "forward_backward": 0.7 * seconds, "optimizer": 0.2 * seconds},
        "peak_memory_bytes": 2**20 * (1 + step),
        "grad_norm": 1.0 / (1 + step),
        "learning_rate": 1e-3,
        "expert_load": load,
        "rows_per_rank": [96 + step, 96 - step],
        "expert_imbalance": 1.5,
        "rank_imbalance": (96 + step) / 96,
        "local_share": 0.5,
        "drop_rate": 0.0,
        "dead_experts": sum(n == 0 for row in load for n in row),
        "bytes": {"node": 1000.0, "host": 500.0},
        "warnings": [],
    }
    if step % 4 == 0:
        made["validation_loss"] = 5.1 - 0.1 * step
    return made | changes


def write_run(
    folder: Path,
    words: Sequence[str] = (),
    records: Sequence[Mapping[str, Any]] | None = None,
    summary: Mapping[str, Any] | None = None,
    ended: bool = True,
) -> Path:
    """A folder of 12 steps on two ranks. summary: changes to it."""
    config = load_config({"name": folder.name}, [*WORDS, *words])
    made = [record(step) for step in range(1, 13)] if records is None else records
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(dump(config))
    (folder / METRICS).write_text("".join(json.dumps(r) + "\n" for r in made))
    environment = {"backend": "cpu", "reason": "torch runs on every host", "world_size": 2, "versions": {"torch": "2"}}
    environment |= {"model_hash": model_hash(config), "config_hash": config_hash(config), "python": "3.11"}
    (folder / ENVIRONMENT).write_text(json.dumps(environment))
    if ended:
        told = {
            "losses": [r["loss"] for r in made],
            "steps": len(made),
            "validation_loss": 3.9,
            "bigram_loss": 4.2,
            "world_size": 2,
            "model_hash": model_hash(config),
            "data_hash": "d" * 64,
            "scheme": config.parallel.scheme,
            "tokens_per_second": 128.0,
        }
        (folder / SUMMARY).write_text(json.dumps(told | dict(summary or {})))
    return folder
