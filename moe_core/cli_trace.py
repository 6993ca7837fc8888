"""`twinmoe trace`, `simulate` and `plan`: what routers chose, what a cluster would make of it, what it should run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .combinations import ConfigError

if TYPE_CHECKING:
    from .trace import Trace

_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object last.")]
_CONFIG = Annotated[str, typer.Argument(metavar="CONFIG", help="A path or a packaged name.", show_default=False)]
_WORDS = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file's.")
]
_CLUSTER = Annotated[str | None, typer.Option(metavar="FILE", help="Levels and memory: a path or a packaged name.")]
_MOST = 2**16
_RANKS = Annotated[int, typer.Option(min=1, max=_MOST, metavar="N", help="Ranks of the cluster.")]
_TRACE = Annotated[Path | None, typer.Option(metavar="FILE", help="A trace file, or a run folder that holds one.")]
_SKEW = Annotated[str, typer.Option(metavar="SKEW", help="Of made-up choices, where there is no trace.")]
_LAYER = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Of `bench layer --json`; default: the cluster's rate."),
]
_TRACE_OUT = Annotated[Path, typer.Option("--out", metavar="FILE", help="The new trace.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    group = typer.Typer(help="What routers chose, on disk.", add_completion=False)
    group.command(name="record")(record)
    group.command(name="import")(import_)
    group.command(name="synth")(synth)
    group.command(name="show")(show)
    app.add_typer(group, name="trace")
    app.command(name="simulate")(simulate)
    app.command(name="plan")(plan)


def record(
    config: _CONFIG,
    overrides: _WORDS = None,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="Steps between those that are recorded.")] = 1,
    nproc: Annotated[str, typer.Option("--nproc", metavar="N|auto", help="Local processes.")] = "auto",
    run_dir: Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="Run folder.")] = None,
    as_json: _JSON = False,
) -> None:
    """Train CONFIG and record what its routers choose, in the run folder's trace/."""
    from rich.console import Console

    from .trace import read
    from .trace_record import FOLDER
    from .train_request import TrainRequest, resolve, start

    words = (*(overrides or ()), f"train.trace_every={every}")
    resolved = resolve(TrainRequest(config, words, nproc, run_dir))
    start(resolved, Console(stderr=as_json))
    folder = resolved.run_dir / FOLDER
    report = {"trace": str(folder), **_summary(read(folder))}
    _tell(report, as_json, f"{report['records']} records of {report['ranks']} ranks in {folder}")


def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="A .jsonl file per rank, or one .npy file.")],
    out: _TRACE_OUT = Path("imported.twtrace"),
    experts: Annotated[int | None, typer.Option(min=1, metavar="E", help="Experts of a layer.")] = None,
    as_json: _JSON = False,
) -> None:
    """Take over Megatron-Core's routing trace (JSON lines) or an array of ids (steps, layers, ranks, tokens, K)."""
    from .run_folder import check_output
    from .trace_make import import_array, import_megatron, write

    check_output(out)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"there is no file {missing[0]}; name files that exist")
    if files[0].suffix == ".npy":
        info, records = import_array(files[0], experts)
    elif experts is None:
        raise ConfigError("a routing trace does not say how many experts there are; add --experts E")
    else:
        info, records = import_megatron(files, experts)
    count = write(out, info, records)
    _tell(
        {"trace": str(out), "records": count, **vars(info)}, as_json, f"{count} records of {info.ranks} ranks in {out}"
    )


def synth(
    out: _TRACE_OUT = Path("synthetic.twtrace"),
    skew: Annotated[str, typer.Option(metavar="SKEW", help="balanced, hot:P:H, zipf:S, ...: see docs.")] = "balanced",
    experts: Annotated[int, typer.Option(min=1, max=_MOST, metavar="E", help="Experts of a layer.")] = 64,
    top_k: Annotated[int, typer.Option(min=1, metavar="K", help="Experts per token.")] = 2,
    ranks: Annotated[int, typer.Option(min=1, max=_MOST, metavar="R", help="Ranks.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, metavar="T", help="Tokens per rank.")] = 4096,
    layers: Annotated[int, typer.Option(min=1, metavar="L", help="Layers.")] = 1,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps.")] = 1,
    drift: Annotated[int, typer.Option(metavar="N", help="Ids by which hot experts move on every step.")] = 0,
    shift_at: Annotated[int | None, typer.Option(metavar="STEP", help="From here other experts are hot.")] = None,
    repeat_ids: Annotated[bool, typer.Option("--repeat-ids", help="A token may choose an expert twice.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the choices.")] = 0,
    as_json: _JSON = False,
) -> None:
    """Make up choices of a stated skew: steady, drifting, or with a shift of domain."""
    from .run_folder import check_output
    from .synthetic import Skew
    from .trace_make import Synthetic, write

    check_output(out, new=True)
    made = Synthetic(Skew.parse(skew, repeat_ids), experts, top_k, ranks, tokens, layers, steps, drift, shift_at, seed)
    count = write(out, made.info, made.records())
    _tell(
        {"trace": str(out), "records": count, **vars(made.info)}, as_json, f"{count} records of {ranks} ranks in {out}"
    )


def show(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace file, or a run folder that holds one.")],
    as_json: _JSON = False,
) -> None:
    """What a trace holds: size, skew of experts and ranks by layer, duplicates among nodes of a token's experts."""
    from .trace import read

    report = _summary(read(trace))
    lines = [", ".join(f"{k} {v}" for k, v in report.items() if k != "layers")]
    lines += [
        "layer {layer:3d}  busiest expert {expert_imbalance:5.2f} x mean, of owners on the recorded ranks "
        "{rank_imbalance:5.2f} x; busiest {busiest}; changes a step by {change:.3f}".format(**row)
        for row in report["layers"]
    ]
    _tell(report, as_json, "\n".join(lines))


def simulate(
    config: _CONFIG,
    overrides: _WORDS = None,
    ranks: _RANKS = 8,
    scheme: Annotated[
        list[str] | None, typer.Option(metavar="NAME[,KEY=VALUE]...", help="Default: ep llep hiermoe laer fsdp_ep.")
    ] = None,
    cluster: _CLUSTER = None,
    trace: _TRACE = None,
    skew: _SKEW = "zipf:0.5",
    layer: _LAYER = None,
    as_json: _JSON = False,
) -> None:
    """A training step of CONFIG on N ranks under every scheme: time by part, bytes, memory. Nothing runs."""
    from .simulate_request import Question, simulate_schemes

    question = Question(config, tuple(overrides or ()), ranks, cluster, trace, skew, tuple(layer or ()))
    report = simulate_schemes(question, scheme)
    rows = [_row(row) for row in report["rows"]]
    _tell(report, as_json, "\n".join([*_table(rows), report["rates"]]))


def plan(
    config: _CONFIG,
    overrides: _WORDS = None,
    ranks: _RANKS = 8,
    cluster: _CLUSTER = None,
    trace: _TRACE = None,
    skew: _SKEW = "zipf:0.5",
    layer: _LAYER = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the scheme file here.")] = None,
    as_json: _JSON = False,
) -> None:
    """Which way of running CONFIG a cluster should take, and why; `--out` writes it as a scheme file."""
    from .choose_scheme import write_scheme
    from .run_folder import check_output
    from .simulate_request import Question, plan_ways

    question = Question(config, tuple(overrides or ()), ranks, cluster, trace, skew, tuple(layer or ()))
    check_output(out, new=True)
    advice, rates = plan_ways(question)
    if out is not None:
        write_scheme(advice.winner.config, out, advice.sentences())
    report = {**advice.as_dict(), "rates": rates.note, "file": None if out is None else str(out)}
    rows = [_row(row) for row in report["rows"][:12]]
    _tell(report, as_json, "\n".join([*_table(rows), "", *advice.sentences()]))


def _summary(trace: Trace) -> dict[str, Any]:
    """Figures of `trace show`."""
    import numpy as np

    info, rows = trace.info, []
    for layer in trace.layers:
        loads = np.stack([sum(r.counts_RE.sum(0) for r in trace.micros(step, layer)) for step in trace.steps])
        total, shares = loads.sum(0), loads / np.maximum(loads.sum(1, keepdims=True), 1)
        owners = np.array([part.sum() for part in np.array_split(total, min(info.ranks, info.num_experts))])
        change = np.abs(np.diff(shares, axis=0)).sum(1).mean() / 2 if len(shares) > 1 else 0.0
        row = {
            "layer": layer,
            "expert_imbalance": float(total.max() / max(total.mean(), 1e-30)),
            "rank_imbalance": float(owners.max() / max(owners.mean(), 1e-30)),
            "busiest": np.argsort(-total, kind="stable")[:4].tolist(),
            "change": float(change),
        }
        rows.append(row)
    sampled = int(np.median([len(r.ids_SK) for r in trace.records.values()]))
    head = {"records": len(trace.records), "steps": len(trace.steps), "ranks": info.ranks}
    more = {"num_experts": info.num_experts, "top_k": info.top_k, "sampled_tokens": sampled, "source": info.source}
    return {**head, **more, "layers": rows}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `simulate` for people."""
    parts, total = row["parts_milliseconds"], max(row["step_milliseconds"], 1e-30)
    exchanges = sum(parts.get(k, 0.0) for k in ("plan", "dispatch", "combine", "backward_exchanges", "tensor"))
    experts = sum(parts.get(k, 0.0) for k in ("compute", "backward_compute", "recompute"))
    weights = sum(parts.get(k, 0.0) for k in ("weights", "backward_weights"))
    return {
        "scheme": row["scheme"],
        "step ms": f"{row['step_milliseconds']:.5g}",
        "rows %": f"{100 * exchanges / total:.0f}",
        "experts %": f"{100 * experts / total:.0f}",
        "weights %": f"{100 * weights / total:.0f}",
        "busiest": f"{row['straggler']:.2f}",
        "GiB": f"{row['memory_bytes'] / 2**30:.3g}",
    }


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    heads = list(rows[0])
    cells = [heads, *([str(row[h]) for h in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]


def _tell(report: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(report) if as_json else text, flush=True)
