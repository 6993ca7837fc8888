"""The command line on a small text in a folder of its own: run it, see which workers are left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

SMALL: dict[str, Any] = {
    "name": "small",
    "backend": "cpu",
    "model": {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2},
    "moe": {"num_experts": 4, "top_k": 2, "expert_hidden_size": 16, "z_loss_coeff": 0.01},
    "train": {"steps": 4, "global_batch_size": 8, "sequence_length": 16, "warmup_steps": 2, "timeout_s": 30},
    "data": {"source": "text", "paths": ["text.txt"]},
}
Done = subprocess.CompletedProcess[str]


def prepare(folder: Path, config: Mapping[str, Any] = SMALL) -> Path:
    """small.yaml and text.txt in the folder."""
    (folder / "small.yaml").write_text(yaml.safe_dump(dict(config)))
    words = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls")
    (folder / "text.txt").write_text(" ".join(words[(i * i + i // 3) % len(words)] for i in range(4000)))
    return folder


def command(*words: str, fault: Mapping[str, Any] | None = None) -> list[str]:
    """`twinmoe train small.yaml WORDS`; fault: of `faulty.py`."""
    if fault is None:
        return [sys.executable, "-m", "twinmoe.moe_core.cli", "train", "small.yaml", *words]
    faulty = "twinmoe.testing.end_to_end.faulty"
    return [sys.executable, "-m", faulty, json.dumps(dict(fault)), "train", "small.yaml", *words]


def train(folder: Path, *words: str, fault: Mapping[str, Any] | None = None, seconds: float = 200) -> Done:
    """Run it to its end."""
    return subprocess.run(command(*words, fault=fault), cwd=folder, capture_output=True, text=True, timeout=seconds)


def report(done: Done) -> dict[str, Any]:
    """The JSON of a run that ended well."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def workers(folder: Path) -> list[int]:
    """Process ids of workers that run in this folder, by rank."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes()
                here = os.readlink(entry / "cwd") == str(folder)
            except OSError:
                continue
            worker = b"twinmoe.moe_core.worker" in words or b"end_to_end.faulty\0train" in words
            if here and worker and b"torch.distributed.run" not in words:
                found.append(int(entry.name))
    return sorted(found)


def gone(folder: Path, seconds: float = 20) -> bool:
    """Whether no worker is left, at once or soon."""
    deadline = time.monotonic() + seconds
    while workers(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not workers(folder)
