"""`twinmoe compare`, `eval` and `report`: runs beside one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .combinations import ConfigError

_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object last.")]
_WORDS = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file's.")
]
_NPROC = Annotated[str, typer.Option("--nproc", metavar="N|auto", help="Local processes; auto: one a device, else 4.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(name="compare")(compare)
    app.command(name="eval")(evaluate)
    app.command(name="report")(report)


def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A path or a packaged name.", show_default=False)],
    overrides: _WORDS = None,
    schemes: Annotated[
        str, typer.Option(metavar="NAME[,KEY=VALUE...],...", help="Schemes, each with settings behind it.")
    ] = "ep,llep",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each scheme.")] = 3,
    nproc: _NPROC = "auto",
    run_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where the runs go; those there are taken.")] = Path(
        "runs/compare"
    ),
    beside: Annotated[list[Path] | None, typer.Option(metavar="RUN", help="A finished run to tabulate too.")] = None,
    peak_tflops: Annotated[float | None, typer.Option(help="Peak of a device, for MFU.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as CSV.")] = None,
    latex: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as LaTeX (booktabs).")] = None,
    as_json: _JSON = False,
) -> None:
    """Train CONFIG under several schemes and seeds; mean and spread, side by side."""
    from . import compare as module
    from . import compare_table
    from .run_folder import check_output

    for path in (csv, latex):
        check_output(path)
    names = tuple(word.strip() for word in schemes.split(",") if word.strip())
    request = module.CompareRequest(
        config, tuple(overrides or ()), names, seeds, nproc, run_dir, peak_tflops, tuple(beside or ())
    )
    report = module.run(request, Console(stderr=True))
    for path, text in ((csv, compare_table.csv_text), (latex, compare_table.latex_text)):
        if path is not None:
            _write(path, text(report["rows"]))
    _tell(report, as_json, compare_table.text_lines(report["rows"]))
    if any(row["failures"] for row in report["rows"]):
        raise typer.Exit(1)


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run, a step_* folder or a model's.")],
    overrides: _WORDS = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Texts or an exported folder instead of held-out text.")
    ] = None,
    batches: Annotated[int | None, typer.Option(min=1, help="At most so many batches.")] = None,
    nproc: _NPROC = "auto",
    as_json: _JSON = False,
) -> None:
    """The loss of CHECKPOINT by domain: forward only, under any scheme, on any number of ranks."""
    from . import evaluate_request as module

    request = module.EvaluateRequest(checkpoint, tuple(overrides or ()), tuple(data or ()), batches, nproc)
    report = module.run(request)
    _tell(report, as_json, module.lines(report))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page.")] = Path("report.html"),
    as_json: _JSON = False,
) -> None:
    """One HTML file about RUNs, side by side; it needs no network."""
    from .report import write_report
    from .run_folder import check_output

    check_output(out)
    made = write_report(runs, out)
    _tell(made, as_json, [f"{out} shows {', '.join(map(str, runs))}; open it in a browser"])


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error.strerror}); name another file") from None


def _tell(report: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    print(json.dumps(report) if as_json else "\n".join(lines), flush=True)
