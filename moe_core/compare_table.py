"""The table of `compare` for people, spreadsheets and papers: mean and spread, marks where rows differ in kind."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A figure as people read it: the value times `factor` with so many digits behind the point."""

    figure: str
    head: str
    factor: float = 1.0
    digits: int = 2


COLUMNS: tuple[Column, ...] = (
    Column("validation_loss", "validation loss", digits=4),
    Column("tokens_per_second_per_device", "tokens/s/device", digits=0),
    Column("speed_up", "speed-up"),
    Column("mfu", "MFU %", 100.0, 1),
    Column("peak_memory_bytes", "memory MiB", 2.0**-20, 0),
    Column("bytes_per_step", "sent MB/step", 1e-6),
    Column("rank_imbalance", "busiest rank"),
    Column("local_share", "local %", 100.0, 1),
)

_SIGNS: Mapping[str, tuple[str, str, str]] = {
    "another model": ("*", "*", "another model_hash than the first row: it trained another function, nothing compares"),
    "other data": ("†", r"\dagger", "other data than the first row (data_hash): losses do not compare"),
    "other steps": ("§", r"\S", "another number of steps than the first row: losses do not compare"),
    "other ranks": ("¶", r"\P", "another number of ranks than the first row"),
    "another backend": ("‖", r"\|", "another backend than the first row: times and memory do not compare"),
    "failed": ("‡", r"\ddagger", "runs of this row failed; figures are of those that ended"),
}
"""Mark -> its sign in text, in LaTeX's mathematics, and what it means."""


def text_lines(rows: Sequence[Row]) -> list[str]:
    """Aligned text, a line a row, then what the marks mean."""
    cells = [["scheme", "runs", *(c.head for c in COLUMNS)]]
    cells += [[row["scheme"] + _signs(row), str(row["runs"]), *(_cell(row, c, " ± ") for c in COLUMNS)] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) for line in cells
    ]
    return [line.rstrip() for line in lines] + notes(rows)


def notes(rows: Sequence[Row]) -> list[str]:
    """Sentences that belong under the table."""
    used = dict.fromkeys(mark for row in rows for mark in row["marks"])
    told = [f"{_SIGNS[mark][0]} {_SIGNS[mark][2]}" for mark in used]
    told += [failure for row in rows for failure in row["failures"]]
    if any(row["runs"] > 1 for row in rows):
        told.append("± is the sample standard deviation over runs; speed-up is the mean over pairs of the same seed")
    if all(_figure(row, "mfu") is None for row in rows):
        told.append("MFU: no peak is known for this device and precision; give it with --peak-tflops")
    return told


def csv_text(rows: Sequence[Row]) -> str:
    """Every figure in its own unit, mean and spread in columns; hashes and marks beside them."""
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    names += ["speed_up"]
    levels = list(dict.fromkeys(level for row in rows for level in row["bytes_by_level"]))
    heads = ["scheme", "marks", "runs", "steps", "ranks", "backend", "model_hash", "data_hash"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    spreads = [column for name in names for column in (name, f"{name}_spread")]
    writer.writerow([*heads, *spreads, *(f"bytes_{level}" for level in levels)])
    for row in rows:
        about = [row["scheme"], "; ".join(row["marks"]), *(row[head] for head in heads[2:])]
        found = [(_figure(row, name) or {}).get(part) for name in names for part in ("mean", "spread")]
        writer.writerow(
            ["" if v is None else v for v in [*about, *found, *(row["bytes_by_level"].get(n) for n in levels)]]
        )
    return out.getvalue()


def latex_text(rows: Sequence[Row]) -> str:
    """A `tabular` of booktabs, without columns that no row has; notes as comments and a last row each."""
    shown = [c for c in COLUMNS if any(_figure(row, c.figure) for row in rows)]
    lines = [r"\begin{tabular}{l" + "r" * len(shown) + "}", r"\toprule"]
    lines.append(" & ".join(["scheme", *(_escaped(c.head) for c in shown)]) + r" \\ \midrule")
    for row in rows:
        signs = "".join(f"$^{{{_SIGNS[mark][1]}}}$" for mark in row["marks"])
        cells = [_escaped(row["scheme"]) + signs, *(_cell(row, c, r" $\pm$ ") for c in shown)]
        lines.append(" & ".join(cells) + r" \\")
    lines.append(r"\bottomrule")
    for note in notes(rows):
        told = _escaped(note).replace("±", r"$\pm$")
        for sign, latex, _ in _SIGNS.values():
            told = told.replace(sign, f"${latex}$")
        lines.append(rf"\multicolumn{{{len(shown) + 1}}}{{l}}{{\footnotesize {told}}} \\")
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def _signs(row: Row) -> str:
    return "".join(_SIGNS[mark][0] for mark in row["marks"])


def _figure(row: Row, name: str) -> Mapping[str, Any] | None:
    found = row["speed_up"] if name == "speed_up" else row["figures"].get(name)
    return None if found is None or found["mean"] is None else found


def _cell(row: Row, column: Column, joined: str) -> str:
    found = _figure(row, column.figure)
    if found is None:
        return "-"
    texts = [
        f"{column.factor * found[part]:,.{column.digits}f}" for part in ("mean", "spread") if found[part] is not None
    ]
    return joined.join(texts)


def _escaped(text: str) -> str:
    for mark in "\\":
        text = text.replace(mark, r"\textbackslash ")
    for mark in "&%$#_{}":
        text = text.replace(mark, "\\" + mark)
    return text.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")
