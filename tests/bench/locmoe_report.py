"""The page of the LocMoE study: `python tests/bench/locmoe_report.py docs/locmoe.md RESULTS.jsonl...`

Replaces what stands between the page's marks, and draws the front beside it. `locmoe_experiment.py` makes the results.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A setting over its seeds. Differences in percent of validation loss, same seed and steps: against switch without
    locality, and against the same router without locality (where that was run)."""

    setting: str
    results: Sequence[Result]
    differences: Sequence[float]
    own_differences: Sequence[float]

    def mean(self, key: str) -> float:
        """Over seeds and layers; not a number where a run did not measure it."""
        values = [r.get(key, math.nan) for r in self.results]
        return statistics.mean(statistics.mean(v) if isinstance(v, list) else v for v in values)

    @property
    def local(self) -> float:
        return self.mean("local_share")

    @property
    def difference(self) -> float:
        return statistics.mean(self.differences)

    @property
    def steps(self) -> int:
        return int(self.results[0]["steps"])


def read(files: Sequence[Path]) -> list[Result]:
    """All results; of a run that was done twice the first."""
    found: dict[tuple[str, int], Result] = {}
    for file in files:
        for text in file.read_text(encoding="utf-8").splitlines():
            result = json.loads(text)
            found.setdefault((result["setting"], result["seed"]), result)
    return list(found.values())


def lines(results: Sequence[Result]) -> list[Line]:
    """Settings with at least one seed whose baseline is there, best local share first."""
    losses = {_without_locality(r): r["validation_loss"] for r in results if r["mu"] == 0.0}
    grouped: dict[str, list[Result]] = {}
    for r in results:
        if _switch(r) in losses:
            grouped.setdefault(r["setting"], []).append(r)
    made = []
    for setting, members in grouped.items():
        members = sorted(members, key=lambda r: r["seed"])
        own = [_percent(r, losses[_without_locality(r)]) for r in members if r["mu"] and _without_locality(r) in losses]
        made.append(Line(setting, members, [_percent(r, losses[_switch(r)]) for r in members], own))
    return sorted(made, key=lambda line: -line.local)


def _without_locality(result: Result) -> tuple[Any, ...]:
    """What a run shares with the run of the same router without locality."""
    return result["router"], result["top_k"], str(result["more"]), result["seed"], result["steps"]


def _switch(result: Result) -> tuple[Any, ...]:
    return "switch", 1, "[]", result["seed"], result["steps"]


def _percent(result: Result, base: float) -> float:
    return 100 * (result["validation_loss"] / base - 1)


def front(found: Sequence[Line]) -> list[Line]:
    """Lines that no other of as many steps beats in both local share and loss."""
    return [
        a
        for a in found
        if not any(
            b is not a and b.steps == a.steps and b.local >= a.local and b.difference <= a.difference for b in found
        )
    ]


HEAD = (
    "| setting | seeds | validation loss | difference, % | spread | own, % | local | by layer | swapped "
    "| rows crossing | max/mean | dropped, % |"
)


def table(found: Sequence[Line]) -> list[str]:
    """Markdown rows; those on the front are bold."""
    best, rows = front(found), [HEAD, "|" + "---|" * 12]
    for line in found:
        layers = " ".join(f"{np.mean([r['local_share'][i] for r in line.results]):.2f}" for i in range(3))
        spread = f"{statistics.stdev(line.differences):.2f}" if len(line.differences) > 1 else "-"
        own = f"{statistics.mean(line.own_differences):+.2f}" if line.own_differences else "-"
        name = f"**{short(line.setting)}**" if line in best else short(line.setting)
        rows.append(
            f"| {name} | {len(line.results)} | {line.mean('validation_loss'):.4f} | {line.difference:+.2f} | "
            f"{spread} | {own} | {line.local:.3f} | {layers} | {_or_dash(line.mean('swapped_share'))} | "
            f"{line.mean('rows_crossing_per_token'):.3f} | {line.mean('load_max_over_mean'):.2f} | "
            f"{100 * line.mean('drop_rate'):.1f} |"
        )
    return rows


def _or_dash(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3f}"


def short(setting: str) -> str:
    """A setting without what all lines of a table share."""
    for long, brief in (
        ("score_scale=sqrt ", ""),
        ("num_groups=2 ", ""),
        ("inner_router=", "of "),
        ("mu0 by_domain", ""),
    ):
        setting = setting.replace(long, brief)
    return " ".join(setting.rsplit(" ", 1)[0].split())


# --- picture -----------------------------------------------------------------------------------------
WIDTH, HEIGHT, MARGIN, LEFT, HIGHEST = 900, 640, 50, 0.45, 8.0


def picture(found: Sequence[Line]) -> str:
    """Scatter of loss difference (up) over local share (right) as SVG: the front in colour, the aim shaded."""
    fronts = front(found)
    low = math.floor(min(line.difference for line in found))
    high = math.ceil(min(HIGHEST, max(line.difference for line in found)))

    def place(share: float, difference: float) -> tuple[float, float]:
        x = MARGIN + (share - LEFT) / (1.02 - LEFT) * (WIDTH - 2 * MARGIN)
        return x, MARGIN + (high - min(difference, high)) / (high - low) * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        '<style>text{font:7px sans-serif}</style><rect width="100%" height="100%" fill="white"/>',
        *_axes(place, low, high),
    ]
    for line in found:
        x, y = place(line.local, line.difference)
        colour = "#c00" if line in fronts else "#777"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">'
            f"<title>{line.setting}: {line.local:.1%}, {line.difference:+.2f} %</title></circle>"
        )
        anchor, shift = ("end", -7) if x > WIDTH - 200 else ("start", 7)
        parts.append(
            f'<text x="{x + shift:.1f}" y="{y + 3:.1f}" fill="{colour}" text-anchor="{anchor}">'
            f"{short(line.setting)}</text>"
        )
    parts.append(f'<text x="{WIDTH / 2 - 110}" y="{HEIGHT - 12}">share of rows that stay on their node</text>')
    parts.append('<text x="10" y="20">validation loss against switch without locality, same seeds</text></svg>')
    return "\n".join(parts) + "\n"


def _axes(place: Callable[[float, float], tuple[float, float]], low: int, high: int) -> list[str]:
    """Grid lines with their numbers, and the aim: 80 % local within 1 %."""
    (left, top), (right, bottom) = place(0.8, 1.0), place(1.02, low)
    parts = [f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" fill="#efe"/>']
    for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        x, _ = place(share, 0)
        parts.append(f'<path d="M{x:.1f} {MARGIN}V{HEIGHT - MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{HEIGHT - MARGIN + 15}">{share:.0%}</text>')
    for difference in range(low, high + 1):
        _, y = place(LEFT, difference)
        colour = "#888" if difference == 0 else "#ddd"
        parts.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="{colour}"/>')
        if difference % 2 == 0:
            parts.append(f'<text x="{MARGIN - 32}" y="{y + 3:.1f}">{difference:+d} %</text>')
    return parts


def report(page: Path, files: Sequence[Path]) -> None:
    """Replace what stands between the marks of the page, and draw the length with most settings."""
    begin, end = "<!-- measured -->", "<!-- end -->"
    found = lines(read(files))
    lengths = sorted({line.steps for line in found}, reverse=True)
    measured: list[str] = []
    for steps in lengths:
        measured += [f"### {steps} steps", "", *table([line for line in found if line.steps == steps]), ""]
    text = page.read_text(encoding="utf-8")
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(before + begin + "\n\n" + "\n".join(measured) + "\n" + end + after, encoding="utf-8")
    most = max(lengths, key=lambda steps: sum(line.steps == steps for line in found))
    drawn = [line for line in found if line.steps == most]
    page.with_name(page.stem + "_front.svg").write_text(picture(drawn), encoding="utf-8")


if __name__ == "__main__":
    report(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
