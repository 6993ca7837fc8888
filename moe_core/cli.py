"""The command line: `twinmoe COMMAND ...`.

Every command builds a report (one JSON object) and shows it; `--json` prints the object last on standard
output. Exit status: 0 done, 1 the work failed, 2 the request was wrong (one sentence on standard error).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import cli_compare, cli_convert, cli_trace, packaged
from .combinations import ConfigError
from .launch import JobFailedError
from .worker import REQUEST_ERRORS

Report = Mapping[str, Any]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object last.")]
ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help="A path or a packaged name.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file's.")
]
Nproc = Annotated[str, typer.Option("--nproc", metavar="N|auto", help="Local processes; auto: one a device, else 4.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="Run folder; default runs/NAME-TIME.")]

_BAD_WORDS: Any = typer.BadParameter.__mro__[2]
"""ClickException, of click or of the copy of it that newer typers carry."""

_PLAIN: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(name="twinmoe", help="Train Mixture-of-Experts models.", **_PLAIN)
configs_app = typer.Typer(help="The configs that come with the package.", **_PLAIN)
data_app = typer.Typer(help="Data sets.", **_PLAIN)
bench_app = typer.Typer(help="How fast things are on this machine.", **_PLAIN)
app.add_typer(bench_app, name="bench")
app.add_typer(configs_app, name="configs")
app.add_typer(data_app, name="data")
cli_compare.register(app)
cli_convert.register(app)
cli_trace.register(app)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Which backends work here, with versions; for each other why not and what to install."""
    from . import doctor as module

    report = module.examine()
    _emit(report, as_json, lambda: print(*module.lines(report), sep="\n"))


@app.command()
def train(
    config: ConfigName,
    overrides: Overrides = None,
    nproc: Nproc = "auto",
    run_dir: RunDir = None,
    resume: Annotated[str | None, typer.Option(metavar="auto|DIR", help="Continue from a checkpoint.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the local job; default: a free one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the merged file and its sizes; no run.")] = False,
    as_json: Json = False,
) -> None:
    """Train CONFIG, with local processes or as a part of the job that a launcher started."""
    from .progress import summary_lines
    from .train_request import TrainRequest, resolve, start

    request = TrainRequest(config, tuple(overrides or ()), nproc, run_dir, resume, port)
    if dry_run:
        _emit_dry_run(request, as_json)
        return
    summary = start(resolve(request), Console(stderr=as_json))
    if summary.get("rank", 0) == 0:
        _emit(summary, as_json, lambda: print(*summary_lines(summary), sep="\n"))


@app.command()
def verify(
    level: Annotated[str, typer.Option(metavar="quick|standard|full", help="How many cases.")] = "standard",
    worlds: Annotated[str, typer.Option(metavar="N,...", help="Numbers of local processes.")] = "2,4",
    backend: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Which backends; default: train's.")] = None,
    dtype: Annotated[str, typer.Option(metavar="float64|float32|bfloat16", help="Precision of the layer.")] = "float64",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Run twice, compare bits.")] = False,
    as_json: Json = False,
) -> None:
    """Compare every way of running a layer with the dense oracle, on this machine's backends and ranks."""
    from .verify_request import VerifyRequest, lines, verify

    report = verify(VerifyRequest(level, worlds, tuple(backend or ()), dtype, deterministic))
    _emit(report, as_json, lambda: print(*lines(report), sep="\n"))
    if report["failed"] or report.get("differing"):
        raise typer.Exit(1)


@app.command()
def acceptance(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="New file for reports and logs.")] = Path(
        "bundle.tgz"
    ),
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the one that train would take.")] = None,
    nproc: Nproc = "auto",
    as_json: Json = False,
) -> None:
    """What a new machine should show, in under 15 minutes, packed into one file."""
    from . import acceptance as module

    console = Console(stderr=True)
    report = module.run(module.AcceptanceRequest(out, backend, nproc), lambda name: console.print(f"{name} ..."))
    _emit(report, as_json, lambda: print(*module.lines(report), sep="\n"))
    if not report["passed"]:
        raise typer.Exit(1)


@bench_app.command(name="planner")
def bench_planner(as_json: Json = False) -> None:
    """Milliseconds to plan, by planner, experts and ranks; compilation is left out."""
    from . import bench_planner as module

    report = module.run()
    _emit(report, as_json, lambda: print(*table_lines(report["rows"]), sep="\n"))


@bench_app.command(name="router")
def bench_router(
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the one that train would take.")] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="T", help="Tokens.")] = 8192,
    hidden: Annotated[int, typer.Option(min=1, metavar="D", help="Width of tokens.")] = 1024,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls; the best is reported.")] = 9,
    as_json: Json = False,
) -> None:
    """Milliseconds to choose experts, by router and number of experts, beside plain softmax and top-k."""
    from ..backends.registry import load
    from . import bench_router as module

    report = module.run(load(backend), tokens=tokens, hidden_size=hidden, repeats=repeats)
    _emit(report, as_json, lambda: print(*table_lines(report["rows"]), sep="\n"))


@bench_app.command(name="layer")
def bench_layer(
    configs: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG]...", help="Whose layer; default: few-experts many-experts.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="T", help="Tokens.")] = 2048,
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="Precision.")] = "float32",
    skew: Annotated[str | None, typer.Option(metavar="SKEW", help="Of the choices; default: the router's own.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls; medians are reported.")] = 9,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Time AdamW's step too.")] = False,
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the one that train would take.")] = None,
    as_json: Json = False,
) -> None:
    """One layer on one device, forward and backward, fused operations beside plain ones."""
    from ..backends.registry import load
    from . import bench_layer as module

    names, precision = tuple(configs or module.SHAPES), module.precision(dtype)
    request = module.LayerRequest(names, tokens, precision, skew, repeats, optimizer=optimizer)
    report = module.run(load(backend), request)
    _emit(report, as_json, lambda: print(*table_lines(report["rows"]), sep="\n"))


Testbed = Annotated[
    str | None, typer.Option("--testbed", metavar="NODESxRANKS", help="Nodes as network namespaces, for example 2x2.")
]
Rate = Annotated[str | None, typer.Option("--rate", help="Of a testbed node's link, for example 200mbit.")]
Link = Annotated[
    str | None,
    typer.Option("--link", metavar="nvlink|shared_memory|socket", help="Between the GPUs of this host."),
]


@bench_app.command(name="comm")
def bench_comm(
    with_fit: Annotated[bool, typer.Option("--fit", help="Fit alpha and beta to every level.")] = False,
    cluster: Annotated[str | None, typer.Option(metavar="NAME", help="Levels: a path or a packaged name.")] = None,
    nproc: Nproc = "auto",
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the one that train would take.")] = None,
    testbed: Testbed = None,
    rate: Rate = None,
    link: Link = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the fitted cluster file here.")] = None,
    as_json: Json = False,
) -> None:
    """Milliseconds of collectives by level and size, and the lines that fit them."""
    from . import bench_comm as module
    from .bench_job import Where

    where = Where(nproc, backend, testbed, rate, link=link)
    report = module.run(module.CommRequest(where, cluster, with_fit, out))
    _emit(report, as_json, lambda: print(*table_lines(report["rows"]), "", *table_lines(report["fit"]), sep="\n"))


@bench_app.command(name="schemes")
def bench_schemes(
    scheme: Annotated[
        list[str] | None, typer.Option(metavar="NAME[,KEY=VALUE]...", help="Default: all that fit the ranks.")
    ] = None,
    skew: Annotated[list[str] | None, typer.Option(metavar="SKEW", help="Of the choices, see docs.")] = None,
    top_k: Annotated[list[int] | None, typer.Option(metavar="K", help="Experts per token.")] = None,
    experts: Annotated[int, typer.Option(metavar="E", help="Experts of the layer.")] = 32,
    hidden: Annotated[int, typer.Option(metavar="D", help="Width of tokens.")] = 256,
    expert_hidden: Annotated[int, typer.Option(metavar="F", help="Width inside an expert.")] = 256,
    tokens: Annotated[int, typer.Option(metavar="T", help="Tokens per rank.")] = 512,
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="Precision.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps; medians are reported.")] = 15,
    repeat_ids: Annotated[bool, typer.Option("--repeat-ids", help="A token may choose an expert twice.")] = False,
    cluster: Annotated[str | None, typer.Option(metavar="NAME", help="Levels: a path or a packaged name.")] = None,
    nproc: Nproc = "auto",
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the one that train would take.")] = None,
    testbed: Testbed = None,
    rate: Rate = None,
    link: Link = None,
    as_json: Json = False,
) -> None:
    """One layer, forward and backward, under every scheme on the same choices."""
    from . import bench_schemes_request as module
    from .bench_job import Where

    request = module.SchemesRequest(
        Where(nproc, backend, testbed, rate, link=link),
        tuple(scheme or module.SCHEMES),
        tuple(skew or module.SKEWS),
        tuple(top_k or (2,)),
        experts,
        hidden,
        expert_hidden,
        tokens,
        dtype,
        repeats,
        cluster,
        repeat_ids,
    )
    report = module.run(request)
    _emit(report, as_json, lambda: print(*table_lines(module.table(report["rows"])), sep="\n"))


@app.command(name="launch")
def launch_command(
    config: ConfigName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 2,
    nproc: Annotated[int, typer.Option(min=1, metavar="M", help="Processes on each node.")] = 8,
    launcher: Annotated[
        str, typer.Option("--print", metavar="torchrun|msrun|slurm", help="For which launcher.")
    ] = "torchrun",
    run_dir: Annotated[str, typer.Option(metavar="DIR", help="On a file system that all nodes share.")] = "runs/job",
    as_json: Json = False,
) -> None:
    """Print ready text that trains CONFIG on several nodes."""
    from ..backends.registry import HOMES, home_environment
    from .combinations import check_ranks
    from .compose import command_line_backend, load_config
    from .launch_text import LAUNCHERS, Cluster, launch_text

    if launcher not in LAUNCHERS:
        raise ConfigError(f"--print {launcher} is unknown; choose one of {', '.join(LAUNCHERS)}")
    cluster, words = Cluster(nodes, nproc), tuple(overrides or ())
    merged = load_config(config, words)
    check_ranks(merged, cluster.ranks)
    backend = command_line_backend(words) or merged.backend or ("ascend" if launcher == "msrun" else None)
    wanted = home_environment(backend, merged.communication.model_dump()) if backend and backend in HOMES else {}
    text = launch_text(launcher, cluster, [config, *words], run_dir, wanted)
    _emit({"launcher": launcher, "ranks": cluster.ranks, "text": text}, as_json, lambda: print(text, end=""))


@configs_app.command(name="list")
def configs_list(as_json: Json = False) -> None:
    """Names of all packaged configs by kind."""
    report = {kind: packaged.names(folder) for kind, folder in packaged.KINDS.items()}
    _emit(
        report,
        as_json,
        lambda: print(*(f"{kind + ':':12}{' '.join(names)}" for kind, names in report.items()), sep="\n"),
    )


@configs_app.command(name="show")
def configs_show(name: str, as_json: Json = False) -> None:
    """Print one packaged file as it is."""
    path = packaged.find(name)
    report = {"name": name, "kind": packaged.kind_of(path), "text": path.read_text(encoding="utf-8")}
    _emit(report, as_json, lambda: print(report["text"], end=""))


@configs_app.command(name="copy")
def configs_copy(
    name: str, to: Annotated[Path | None, typer.Argument(metavar="[FILE]")] = None, as_json: Json = False
) -> None:
    """Copy one packaged file, to start an own one from."""
    path = packaged.find(name)
    target = to or Path(path.name)
    target = target / path.name if target.is_dir() else target
    if target.exists():
        raise ConfigError(f"{target} exists; name another file")
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        raise ConfigError(f"{target} can't be written ({error.strerror}); name another file") from None
    _emit({"name": name, "file": str(target)}, as_json, lambda: print(f"{name} copied to {target}"))


@data_app.command(name="export")
def data_export(
    config: ConfigName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the tokens.")] = Path("data"),
    as_json: Json = False,
) -> None:
    """Write CONFIG's data as token files to carry along; the batches stay the same."""
    from .compose import load_config
    from .data import open_data
    from .data_memmap import export, new_folder

    merged = load_config(config, tuple(overrides or ()))
    try:
        data = open_data(merged.data, merged.train, new_folder(out))
        export(data, out)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    report = {"folder": str(out), "data_hash": data.hash, "vocab_size": data.vocab_size}
    told = f"{out} holds the data (hash {data.hash}); use it with data.source=memmap data.paths=[{out}]"
    _emit(report, as_json, lambda: print(told))


def _emit_dry_run(request: Any, as_json: bool) -> None:
    from .compose import dump
    from .shapes import shapes
    from .train_request import read_request

    config, choice, ranks = read_request(request)
    sizes = shapes(config, ranks, choice.name)
    report = {"config": config.model_dump(mode="json"), "backend": choice.name, **sizes.as_dict()}
    _emit(report, as_json, lambda: print(dump(config), *(f"# {line}" for line in sizes.lines()), sep="\n"))


def _emit(report: Report, as_json: bool, show: Callable[[], object]) -> None:
    """One JSON object, or what people read."""
    if as_json:
        print(json.dumps(report), flush=True)
    else:
        show()


def table_lines(rows: Sequence[Report]) -> list[str]:
    """Rows as aligned text; a key that a row lacks is a dash."""
    if not rows:
        return ["no rows"]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, *([_cell(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return ["  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in cells]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def run(words: Sequence[str]) -> int:
    """Run one command line and return its exit status."""
    try:
        status = app(list(words) or ["--help"], prog_name="twinmoe", standalone_mode=False)
    except _BAD_WORDS as error:
        return _complain(f"{error.format_message().rstrip('.')}; see --help", 2)
    except REQUEST_ERRORS as error:
        return _complain(str(error), 2)
    except JobFailedError as error:
        return _complain(str(error), 2 if error.request else 1)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", 1)
    except Exception:
        traceback.print_exc()
        return 1
    return status if isinstance(status, int) else 0  # what a command that raises typer.Exit asked for


def _complain(sentence: str, status: int) -> int:
    print(f"twinmoe: {sentence}", file=sys.stderr)
    return status


def main() -> None:
    """The console script. A rank of a job leaves at once: gloo's threads sometimes abort Python's shutdown."""
    from ..backends.registry import surrounding_launcher

    status = run(sys.argv[1:])
    if surrounding_launcher() == "torchrun":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
