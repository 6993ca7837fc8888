"""Pages that come from the code, written while mkdocs builds: commands, settings, Python, what combines, a grid."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from twinmoe import moe_core
from twinmoe.moe_core import cli, packaged
from twinmoe.moe_core.combinations import RULES, ConfigError
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.exactness import ROUTINGS
from twinmoe.moe_core.verify import TOLERANCE, choose_cases
from twinmoe.moe_core.words import WORDS

HERE = Path(__file__).parent
GRID = "<!-- grid -->"


def on_config(config: Any) -> Any:
    """Pages that the navigation does not name yet stand under `More`."""
    named = set(_named(config.nav))
    others = [p.relative_to(HERE).as_posix() for p in sorted(HERE.rglob("*.md"))]
    more = [page for page in others if page not in named]
    if more:
        config.nav = [*config.nav, {"More": more}]
    return config


def _named(nav: Any) -> Iterator[str]:
    for item in nav if isinstance(nav, list) else [nav]:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            for value in item.values():
                yield from _named(value)


def on_files(files: Files, config: Any) -> Files:
    """The generated pages, as if they lay in the folder."""
    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The grid of `verify` in the page that asks for it."""
    return markdown.replace(GRID, grid()) if GRID in markdown else markdown


def pages() -> dict[str, str]:
    """Path -> Markdown of every page that comes from the code."""
    return {
        "reference/commands.md": commands(),
        "reference/settings.md": settings(),
        "reference/python.md": python(),
        "reference/combinations.md": combinations(),
    }


# --- commands ----------------------------------------------------------------------------------
def commands() -> str:
    lines = [
        "# Commands",
        "",
        "Every command takes `--json` and then prints one JSON object last. Exit status: 0 done, 1 the work failed, "
        "2 the request was wrong (one sentence on standard error).",
        "",
    ]
    for name, command in _leaves(typer.main.get_command(cli.app), "twinmoe"):
        lines += [f"## {name}", "", (command.help or "").strip(), "", "| | | default |", "|---|---|---|"]
        for parameter in command.params:
            if parameter.name in ("as_json", "help"):
                continue
            metavar = getattr(parameter, "metavar", None) or ""
            shown = ", ".join(parameter.opts) if parameter.param_type_name == "option" else metavar or parameter.name
            told = f"{shown} {metavar}".strip() if parameter.param_type_name == "option" else shown
            default = parameter.default
            default = "" if default is None or callable(default) or parameter.required else _code(default)
            lines.append(f"| <code>{_cell(told)}</code> | {_cell(getattr(parameter, 'help', '') or '')} | {default} |")
        lines.append("")
    return "\n".join(lines)


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for key in inner:
        yield from _leaves(inner[key], f"{name} {key}")


# --- settings ----------------------------------------------------------------------------------
def settings() -> str:
    meanings = {word.field: word.meaning for word in WORDS}
    lines = [
        "# Settings",
        "",
        "What an experiment file may say, and each `key=value` word of a command line. Unknown keys are refused with "
        "the nearest one that exists; names of other systems are answered with ours ([words](../words.md)); what does "
        "not combine stands in [its table](combinations.md).",
        "",
    ]
    top = [(n, f) for n, f in Config.model_fields.items() if not _section(f.annotation)]
    lines += ["## At the top", "", *_table(top, "", meanings), ""]
    for name, field in Config.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            lines += _section_lines(name, section, meanings)
    return "\n".join(lines)


def _section_lines(path: str, section: type[BaseModel], meanings: Mapping[str, str]) -> list[str]:
    inner = [(n, s) for n, f in section.model_fields.items() if (s := _section(f.annotation)) is not None]
    inner += [(f"{n}[]", s) for n, f in section.model_fields.items() if (s := _listed(f.annotation)) is not None]
    plain = [(n, f) for n, f in section.model_fields.items() if _section(f.annotation) is None]
    told = inspect.cleandoc(section.__doc__ or "") if "__doc__" in vars(section) else ""
    lines = [f"## {path}", "", told.replace("<", "&lt;"), "", *_table(plain, f"{path}.", meanings), ""]
    for name, nested in inner:
        lines += _section_lines(f"{path}.{name}", nested, meanings)
    return lines


def _table(fields: Sequence[tuple[str, Any]], prefix: str, meanings: Mapping[str, str]) -> list[str]:
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    for name, field in fields:
        values = _cell(_type(field.annotation))
        limits = ", ".join(_limit(m) for m in field.metadata if _limit(m))
        default = "required" if field.is_required() else _code(field.default)
        key = f"{prefix}{name}"
        lines.append(f"| `{key}` | {values}{' ' + limits if limits else ''} | {default} | {meanings.get(key, '')} |")
    return lines


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _listed(annotation: Any) -> type[BaseModel] | None:
    arguments: Any = getattr(annotation, "__args__", ())
    return _section(arguments[0]) if getattr(annotation, "__origin__", None) is tuple else None


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        names = {"bool": "true, false", "int": "integer", "float": "number", "str": "text", "Fraction": "fraction"}
        return names.get(annotation.__name__, annotation.__name__)
    origin: Any = getattr(annotation, "__origin__", None)
    arguments: Any = getattr(annotation, "__args__", ())
    if str(origin) == "typing.Literal":
        return ", ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in arguments)
    if _listed(annotation) is not None:
        return "list, see below"
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if hasattr(annotation, "__metadata__"):
        return _type(origin)
    return ", ".join(_type(a) for a in arguments)


def _limit(mark: Any) -> str:
    signs = {"gt": ">", "ge": "&ge;", "lt": "&lt;", "le": "&le;"}
    return " ".join(f"{sign} {getattr(mark, name)}" for name, sign in signs.items() if hasattr(mark, name))


def _code(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        return "see below"
    if isinstance(value, tuple):
        parts = [_code(v).strip("`") for v in value]
        return f"`[{', '.join(parts)}]`"
    known = {None: "null", True: "true", False: "false"}
    return f"`{known[value] if value is None or isinstance(value, bool) else value}`"


# --- Python ------------------------------------------------------------------------------------
def python() -> str:
    lines = ["# Python", "", "What `twinmoe.moe_core` offers; everything else may change between versions.", ""]
    for name in moe_core.__all__:
        thing = getattr(moe_core, name)
        if name.startswith("__"):
            continue
        try:
            signature = str(inspect.signature(thing)).replace("'", "")
        except (TypeError, ValueError):
            signature = ""
        signature = "" if isinstance(thing, type) and issubclass(thing, (BaseModel, Exception)) else signature
        told = inspect.getdoc(thing) or ""
        lines += [f"## {name}", "", f"```python\n{name}{signature}\n```", "", told.replace("<", "&lt;"), ""]
    return "\n".join(lines)


# --- what combines -----------------------------------------------------------------------------
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "tensor parallel": ("parallel.tensor_parallel_size=2",),
    "heads": ("moe.num_heads=4", "moe.head_dim=64", "moe.activation=gelu"),
    "one copy per node": ("parallel.transport=hierarchical_dedup",),
    "group-wise": ("parallel.transport=groupwise", "parallel.tensor_parallel_size=2"),
    "experts swap": ("parallel.placement=swap",),
    "dense sharded": ("parallel.data_sharding=full",),
    "row budget": ("parallel.max_rows_per_rank=4096",),
    "overlap": ("parallel.overlap_chunks=2",),
    "capacity": ("moe.capacity_factor=1.25",),
}


def combinations() -> str:
    lines = [
        "# What combines",
        "",
        "Made by asking the config: `yes`, or `no` where it refuses. Routers and losses go with every scheme.",
        "",
        "| scheme | " + " | ".join(_OPTIONS) + " |",
        "|---" * (len(_OPTIONS) + 1) + "|",
    ]
    for scheme in packaged.names("schemes"):
        cells = [_combines(scheme, words) for words in _OPTIONS.values()]
        lines.append(f"| `{scheme}` | " + " | ".join(cells) + " |")
    lines += ["", "## Every rule", "", "| these two | where they are refused: why, and what to choose |", "|---|---|"]
    for rule in RULES:
        lines.append(f"| `{rule.first}`, `{rule.second}` | {_cell(rule.why)} |")
    return "\n".join(lines) + "\n"


def _combines(scheme: str, words: Sequence[str]) -> str:
    try:
        load_config({}, [f"parallel.scheme={scheme}", *words])
    except ConfigError:
        return "no"
    return "yes"


# --- exactness ---------------------------------------------------------------------------------
def grid() -> str:
    """Numbers of cases by level and ranks, and on which axes they lie."""
    lines = ["| level | on 1 rank | 2 ranks | 4 ranks |", "|---|---|---|---|"]
    for level in ("quick", "standard"):
        counts = [len(choose_cases(level, world, "float64")) for world in (1, 2, 4)]
        lines.append(f"| `{level}` | " + " | ".join(map(str, counts)) + " |")
    axes: dict[str, dict[str, int]] = {}
    for labelled in choose_cases("standard", 4, "float64"):
        for axis, value in labelled.axes:
            axes.setdefault(axis, {})[value] = axes.setdefault(axis, {}).get(value, 0) + 1
    lines += ["", "Values on each axis of `standard` on four ranks, with how many cases have them:", ""]
    lines += ["| axis | values |", "|---|---|"]
    for axis, values in axes.items():
        lines.append(f"| {axis} | " + ", ".join(f"{value} ({n})" for value, n in values.items()) + " |")
    lines += ["", "| precision | largest relative error of a tensor |", "|---|---|"]
    lines += [f"| `{dtype}` | {limit:g} |" for dtype, limit in TOLERANCE.items()]
    lines += ["", f"Kinds of tokens: {', '.join(ROUTINGS)}."]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "&#124;").replace("\n", " ")
