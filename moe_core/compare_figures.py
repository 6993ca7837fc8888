"""What a finished run measured, as a few figures, read from its run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .combinations import ConfigError
from .compose import load_config
from .config import Config
from .flops import peak_of, training_flops
from .metrics import read_metrics
from .run_folder import CONFIG, ENVIRONMENT, SUMMARY

Record = Mapping[str, Any]

WARM_UP = 5
"""First steps, whose times do not count; of a short run its first half."""


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it; what is missing is empty."""

    path: Path
    config: Config
    records: tuple[Record, ...]
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    @property
    def hashes(self) -> tuple[str | None, str | None]:
        """(model_hash, data_hash): None where the run did not say."""
        model = self.summary.get("model_hash") or self.environment.get("model_hash")
        return model, self.summary.get("data_hash")

    @property
    def ranks(self) -> int:
        return int(self.summary.get("world_size") or self.environment.get("world_size") or 1)


def read_run(path: Path) -> RunFolder:
    """A run folder, finished or not. ConfigError if it is none."""
    if not (path / CONFIG).is_file():
        raise ConfigError(f"{path} is no run folder (no {CONFIG}); name one that `twinmoe train` made")
    records = tuple(read_metrics(path))
    return RunFolder(path, load_config(path / CONFIG), records, _json(path / SUMMARY), _json(path / ENVIRONMENT))


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} can't be read ({error}); take another run folder") from None


def figures(run: RunFolder, peak_tflops: float | None = None) -> dict[str, float | None]:
    """Figures by name; None where the run does not have them.

    Times are medians over steps after a warm-up; loads and bytes means; memory the most of any rank. mfu: share of
    peak_tflops, or of the device's known bfloat16 peak.
    """
    records = run.records
    timed = records[min(WARM_UP, len(records) // 2) :]
    rate = _over(median, [r["tokens"] / r["seconds"] for r in timed if r.get("seconds")])
    per_device = None if rate is None else rate / run.ranks
    last = records[-max(1, len(records) // 10) :]
    return {
        "validation_loss": _number(run.summary.get("validation_loss")),
        "loss_last": _mean(last, "loss"),
        "tokens_per_second_per_device": per_device,
        "mfu": _mfu(run, per_device, peak_tflops),
        "step_seconds": _over(median, [r["seconds"] for r in timed if r.get("seconds")]),
        "peak_memory_bytes": _over(max, [r["peak_memory_bytes"] for r in records if "peak_memory_bytes" in r]),
        "bytes_per_step": _over(fmean, [sum(r["bytes"].values()) for r in records if "bytes" in r]),
        "rank_imbalance": _mean(records, "rank_imbalance"),
        "local_share": _mean(records, "local_share"),
        "drop_rate": _mean(records, "drop_rate"),
        "dead_experts": _number(records[-1].get("dead_experts")) if records else None,
    }


def bytes_by_level(run: RunFolder) -> dict[str, float]:
    """Mean bytes that all ranks send in a step, by level of the cluster."""
    levels = dict.fromkeys(level for record in run.records for level in record.get("bytes", {}))
    return {level: fmean(r["bytes"].get(level, 0.0) for r in run.records if "bytes" in r) for level in levels}


def _mfu(run: RunFolder, rate: float | None, peak_tflops: float | None) -> float | None:
    if peak_tflops is None and run.config.train.dtype == "bfloat16":
        peak_tflops = peak_of(str(run.environment.get("reason", "")))
    if rate is None or peak_tflops is None:
        return None
    return rate * training_flops(run.config) / (1e12 * peak_tflops)


def _mean(records: Sequence[Record], name: str) -> float | None:
    return _over(fmean, [value for r in records if (value := _number(r.get(name))) is not None])


def _over(statistic: Callable[[Sequence[float]], float], values: Sequence[float]) -> float | None:
    return float(statistic(values)) if values else None


def _number(value: Any) -> float | None:
    """Numbers that are not finite were written as text."""
    return float(value) if isinstance(value, (int, float)) else None
