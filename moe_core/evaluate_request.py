"""What `twinmoe eval` was asked: a checkpoint, other data, another scheme; one job, one report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bench_job import Where, ranks_of, run_task
from .combinations import ConfigError, check_ranks
from .compose import command_line_backend, load_config
from .config import Config
from .data_sources import matching_files
from .evaluate import EVERYTHING
from .init_from import checkpoint_folder, is_theirs
from .scheme_auto import settled

_HELD_OUT = "held out"
_ROWS = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class EvaluateRequest:
    """checkpoint: a step_* folder, a run folder (its newest) or the folder of a Hugging Face model.

    data: files, patterns or one exported folder instead of the checkpoint's own held-out text; all of it counts.
    """

    checkpoint: Path
    overrides: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    batches: int | None = None
    nproc: str = "auto"


def run(request: EvaluateRequest) -> dict[str, Any]:
    """The JSON of `eval`. ConfigError for a wrong request; JobFailedError when ranks fail."""
    config = config_of(request)
    named = command_line_backend(request.overrides) or config.backend
    where = Where(request.nproc, named)
    config = settled(config, ranks_of(where)).config
    check_ranks(config, ranks_of(where))
    options = {
        "config": config.model_dump(mode="json"),
        "of": EVERYTHING if request.data else _HELD_OUT,
        "batches": request.batches,
    }
    report = run_task("eval", options, where)
    return {"checkpoint": str(request.checkpoint), "of": options["of"], **report}


def config_of(request: EvaluateRequest) -> Config:
    """The checkpoint's config with the words of the command line; the data are those asked for."""
    folder = request.checkpoint
    if not folder.exists():
        raise ConfigError(f"there is no folder {folder}; name a run folder, a step_* folder or a model's folder")
    words = [*_data_words(request.data), *request.overrides, f"model.init_from={json.dumps(str(folder.absolute()))}"]
    if is_theirs(folder):
        if not request.data and not any(word.startswith("data.") for word in request.overrides):
            raise ConfigError(f"{folder} does not say what it was trained on; name texts with --data")
        tokenizer = folder / "tokenizer.json"
        words = [f"data.tokenizer={json.dumps(str(tokenizer))}"] * tokenizer.exists() + words
        return load_config({}, words)
    return load_config(_saved_config(folder), words)


def _saved_config(folder: Path) -> Mapping[str, Any]:
    path = checkpoint_folder(folder) / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} can't be read ({error!r}); name another checkpoint") from None


def _data_words(paths: Sequence[str]) -> list[str]:
    """--data as settings: an exported folder, rows of a data set, or text."""
    if not paths:
        return []
    if len(paths) == 1 and (Path(paths[0]) / "header.json").is_file():
        return ["data.source=memmap", f"data.paths={json.dumps([str(Path(paths[0]).absolute())])}"]
    try:
        suffix = Path(matching_files(paths[0])[0]).suffix
    except ValueError as error:
        raise ConfigError(str(error).replace("data.paths", "--data")) from None
    source = "hf" if suffix in _ROWS else "text"
    return [f"data.source={source}", "data.dataset=null", f"data.paths={json.dumps(list(paths))}"]


def lines(report: Mapping[str, Any]) -> list[str]:
    """What people read: a line a domain, then all of them."""
    width = max(len(row["domain"]) for row in report["domains"])
    told = [
        f"{row['domain']:{width}}  loss {row['loss']:.4f}  ({row['targets']:,} targets)"
        if row["loss"] is not None
        else f"{row['domain']:{width}}  nothing to predict"
        for row in report["domains"]
    ]
    told.append(
        f"{'all':{width}}  loss {report['loss']:.4f}  perplexity {report['perplexity']:.3f}, step {report['step']}, "
        f"{report['targets']:,} targets ({report['of']})"
    )
    told.append(
        f"scheme {report['scheme']} on {report['world_size']} ranks ({report['backend']}): "
        f"{report['tokens_per_second']:,.0f} tokens/s forward, busiest rank {report['rank_imbalance']:.2f} of the mean"
    )
    return told
