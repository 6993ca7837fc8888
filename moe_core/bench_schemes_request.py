"""What `twinmoe bench schemes` was asked: schemes and their settings, skews, sizes; one job; one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bench_job import Where, ranks_of, run_task
from .combinations import ConfigError, check_ranks
from .compose import load_config
from .config import Config
from .run_folder import model_hash
from .synthetic import Skew, check_size

SCHEMES = ("ep", "llep", "hiermoe", "laer", "fsdp_ep")
DTYPES = ("float32", "bfloat16", "float64")
SKEWS = ("balanced", "hot:75:8", "zipf:1")


@dataclass(frozen=True)
class SchemesRequest:
    """schemes: NAME or NAME,key=value,... (keys of `parallel` without the prefix; others in full).

    num_experts, expert_hidden_size: of the layer; tokens: per rank.
    """

    where: Where
    schemes: tuple[str, ...] = SCHEMES
    skews: tuple[str, ...] = SKEWS
    top_ks: tuple[int, ...] = (2,)
    num_experts: int = 32
    hidden_size: int = 256
    expert_hidden_size: int = 256
    tokens: int = 512
    dtype: str = "float32"
    repeats: int = 15
    cluster: str | None = None
    repeat_ids: bool = False
    seed: int = 0


def run(request: SchemesRequest) -> dict[str, Any]:
    """The JSON of `bench schemes`. ConfigError for a wrong request; JobFailedError when ranks fail."""
    _check(request)
    configs = {name: scheme_config(name, request) for name in request.schemes}
    check_size(request.tokens, request.num_experts)
    for text in request.skews:
        for top_k in request.top_ks:
            Skew.parse(text, request.repeat_ids).check(request.num_experts, top_k)
    ranks = ranks_of(request.where)
    for config in configs.values():
        sequences = {"train": config.train.model_copy(update={"global_batch_size": ranks, "micro_batch_size": None})}
        check_ranks(config.model_copy(update=sequences), ranks)
    cluster = load_config({}, [f"cluster={request.cluster}"] if request.cluster else []).cluster
    options = {
        "schemes": {name: config.model_dump(mode="json") for name, config in configs.items()},
        "skews": list(request.skews),
        "top_ks": list(request.top_ks),
        "tokens": request.tokens,
        "hidden_size": request.hidden_size,
        "dtype": request.dtype,
        "repeats": request.repeats,
        "repeat_ids": request.repeat_ids,
        "seed": request.seed,
        "cluster": cluster.model_dump(mode="json"),
    }
    report = run_task("bench_schemes", options, request.where)
    named = {"link": request.where.link} if request.where.link else {}
    return {**report, **named, "rows": [_with_hash(row, configs[row["scheme"]]) for row in report["rows"]]}


def _check(request: SchemesRequest) -> None:
    sizes = {"--tokens": request.tokens, "--hidden": request.hidden_size, "--top-k": min(request.top_ks)}
    for option, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{option} {size} is not a size; choose 1 or above")
    if request.dtype not in DTYPES:
        raise ConfigError(f"--dtype {request.dtype} is unknown; choose one of {', '.join(DTYPES)}")


def scheme_config(text: str, request: SchemesRequest) -> Config:
    """The config of one entry of --scheme. ConfigError for an unknown scheme or key."""
    name, *settings = text.split(",")
    words = [
        f"moe.num_experts={request.num_experts}",
        f"moe.expert_hidden_size={request.expert_hidden_size}",
        f"moe.top_k={max(request.top_ks)}",
        f"model.hidden_size={request.hidden_size}",
        f"parallel.scheme={name}",
    ]
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(
                f"{setting!r} in the scheme {text!r} is not key=value; for example {name},placement=fixed"
            )
        words.append(setting if setting.startswith(("parallel.", "moe.")) else f"parallel.{setting}")
    return load_config({}, words)


def _with_hash(row: Mapping[str, Any], config: Config) -> dict[str, Any]:
    moe = config.moe.model_copy(update={"top_k": row["top_k"]})
    return {**row, "model_hash": model_hash(config.model_copy(update={"moe": moe}))}


def mixed_models(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows of one cell compute different functions: then times are not comparable."""
    cells: dict[Any, set[str]] = {}
    for row in rows:
        cells.setdefault((row["top_k"], row["skew"]), set()).add(row["model_hash"])
    return any(len(hashes) > 1 for hashes in cells.values())


SHOWN = (
    "scheme",
    "top_k",
    "skew",
    "layer_milliseconds",
    "speed_up",
    "predicted_ceiling",
    "transport_milliseconds",
    "rows_crossing_nodes",
    "busiest_rank_rows",
    "peak_memory_bytes",
)


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for people: times beside the first scheme's of the same cell, with the predicted ceiling."""
    first: dict[Any, Mapping[str, Any]] = {}
    shown = []
    for row in rows:
        base = first.setdefault((row["top_k"], row["skew"]), row)
        mark = "" if base["model_hash"] == row["model_hash"] else " (another model)"
        speed_up = round(base["layer_milliseconds"] / row["layer_milliseconds"], 2)
        whole = {**row, "scheme": row["scheme"] + mark, "speed_up": speed_up}
        shown.append({name: whole.get(name) for name in SHOWN})
    return shown
