"""`twinmoe convert`: checkpoints of Hugging Face to ours and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .combinations import ConfigError

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float64": "F64"}
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object last.")]
_OUT = Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")]


def register(app: typer.Typer) -> None:
    """Add the command group to the command line."""
    group = typer.Typer(help="Checkpoints of Hugging Face, to twinmoe and back.", add_completion=False)
    group.command(name="from-hf")(from_hf)
    group.command(name="to-hf")(to_hf)
    app.add_typer(group, name="convert")


def from_hf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with config.json and safetensors files.")],
    out: _OUT,
    as_json: _JSON = False,
) -> None:
    """Convert a Hugging Face model, to start from it with model.init_from=OUT."""
    from .convert import from_hf as convert

    report = convert(folder, out)
    _tell(report, as_json, f"{report['tensors']} tensors of {report['model_type']}; start with model.init_from={out}")


def to_hf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A converted checkpoint, a step_* or a run folder.")],
    out: _OUT,
    dtype: Annotated[str, typer.Option(help="Where no model is known that it came from.")] = "float32",
    as_json: _JSON = False,
) -> None:
    """Write a checkpoint as a Hugging Face model, in the files and dtypes of the one that it came from."""
    from .convert import to_hf as convert

    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown; choose one of {', '.join(_DTYPES)}")
    report = convert(folder, out, _DTYPES[dtype])
    _tell(report, as_json, f"{report['tensors']} tensors of {report['model_type']} in {out}")


def _tell(report: dict[str, Any], as_json: bool, sentence: str) -> None:
    print(json.dumps(report) if as_json else sentence, flush=True)
