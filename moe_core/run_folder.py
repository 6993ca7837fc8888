"""A run's folder: config.yaml, environment.json, metrics.jsonl, tensorboard/, logs/, checkpoints/step_*/, latest."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ..backends.registry import Backend
from .combinations import ConfigError
from .compose import dump
from .config import Config
from .metrics import METRICS

CONFIG, ENVIRONMENT, SUMMARY, LOGS, CHECKPOINTS = (
    "config.yaml",
    "environment.json",
    "summary.json",
    "logs",
    "checkpoints",
)
_LIBRARIES = (
    "twinmoe",
    "numpy",
    "scipy",
    "pydantic",
    "safetensors",
    "torch",
    "torch-npu",
    "mindspore",
    "triton",
    "numba",
)


def check_output(path: Path | None, new: bool = False) -> None:
    """Before the work whose result goes there. ConfigError where no file can be made; new: where one is already."""
    if path is None:
        return
    if new and path.exists():
        raise ConfigError(f"{path} exists; name another file")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent}; make it or name another file")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} can't be written; name another file")


def default_run_dir(config: Config) -> Path:
    """runs/<name>-<date>-<time>, with a number if a run of that second is there already."""
    stem = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        path = Path("runs") / (stem + suffix)
        if not path.exists():
            return path
    raise ConfigError(f"there are a hundred runs called {stem}; name the next one with --run-dir")


def open_run_folder(run_dir: Path, config: Config, resume: bool) -> None:
    """Make the folder and write the config; one in which no step was made is taken over.

    ConfigError if steps are there and this is not a resume, or if it is no folder for runs.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is a file; choose another --run-dir")
    known = (run_dir / CONFIG).exists()
    if (run_dir / METRICS).exists() and not resume:
        raise ConfigError(
            f"the run folder {run_dir} exists; continue it with --resume auto or choose another --run-dir"
        )
    if run_dir.is_dir() and any(run_dir.iterdir()) and not known:
        raise ConfigError(f"{run_dir} holds other files and is not a run folder; choose another --run-dir")
    try:
        (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        (run_dir / CONFIG).write_text(dump(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the run folder {run_dir} can't be made: {error.strerror}; choose another --run-dir"
        ) from None


def write_environment(run_dir: Path, config: Config, backend: Backend, facts: Mapping[str, Any] | None = None) -> None:
    """environment.json: what ran where. `facts` (data_hash, devices, ...) are added to what is already there."""
    path = run_dir / ENVIRONMENT
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known |= {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "backend": backend.name,
        "decided_by": backend.decided_by,
        "reason": backend.reason,
        "versions": {**library_versions(), **backend.versions},
        "python": platform.python_version(),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "commit": source_commit(),
        "config_hash": config_hash(config),
        "model_hash": model_hash(config),
        **(facts or {}),
    }
    path.write_text(json.dumps(known, indent=1), encoding="utf-8")


def config_hash(config: Config) -> str:
    return _hash(config.model_dump(mode="json"))


def model_hash(config: Config) -> str:
    """Of everything that decides the function that is trained; runs with unlike hashes are not comparable.

    Where first values were read from is no part of it: a run goes on after that folder was moved.
    """
    whole = config.model_dump(mode="json")
    whole["model"].pop("init_from")
    return _hash({"model": whole["model"], "moe": whole["moe"]})


def library_versions() -> dict[str, str]:
    """Installed versions, read from metadata: nothing is imported."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_commit() -> str | None:
    """The commit of a source checkout, with + if it was changed; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
