"""The page of a report: one HTML file that needs nothing else. Tables are written here, charts by `report.js`."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .compare_figures import RunFolder, figures

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def _scaled(factor: float, digits: int, unit: str = "") -> Callable[[float], str]:
    return lambda value: f"{factor * value:,.{digits}f}{unit}"


_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("validation_loss", "validation loss", _scaled(1, 4)),
    ("loss_last", "loss, last tenth", _scaled(1, 4)),
    ("tokens_per_second_per_device", "tokens/s and rank", _scaled(1, 0)),
    ("step_seconds", "step", _scaled(1000, 1, " ms")),
    ("mfu", "model FLOPs utilisation", _scaled(100, 1, " %")),
    ("peak_memory_bytes", "peak memory of a rank", _scaled(2.0**-20, 0, " MiB")),
    ("bytes_per_step", "sent in a step", _scaled(1e-6, 2, " MB")),
    ("rank_imbalance", "busiest rank / mean", _scaled(1, 2)),
    ("local_share", "rows that stay on their rank", _scaled(100, 1, " %")),
    ("drop_rate", "choices dropped", _scaled(100, 2, " %")),
    ("dead_experts", "experts without a row, last step", _scaled(1, 0)),
)


def page(runs: Sequence[RunFolder], labels: Sequence[str], about: Mapping[str, Any]) -> str:
    """The whole document. about: `data` (of `report_data`), `marks` (of each run), `made` (when), `plotly` (its code),
    `advice` (what a planner would choose, by run)."""
    told = [html.escape(label) for label in labels]
    body = [
        _head(told, about),
        _overview(runs, told, about["marks"]),
        _warnings(runs, told),
        _curves(),
        _maps(told),
        _costs(),
        _advice(told, about["advice"]),
        _configs(runs, told),
        _environments(runs, told),
    ]
    data = json.dumps(about["data"], allow_nan=False).replace("<", "\\u003c")
    return "\n".join(
        [
            '<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>twinmoe: {', '.join(told)}</title><style>{_asset('report.css')}</style>",
            '<script>if(matchMedia("(prefers-color-scheme: dark)").matches)'
            'document.documentElement.dataset.theme="dark"</script></head>',
            f"<body><main>{''.join(body)}</main>",
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>{about['plotly']}</script><script>{_asset('report.js')}</script></body></html>",
        ]
    )


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _head(told: Sequence[str], about: Mapping[str, Any]) -> str:
    key = "".join(f'<span><i data-run="{i}"></i>{label}</span>' for i, label in enumerate(told))
    return (
        f"<header><h1>{told[0] if len(told) == 1 else f'{len(told)} runs side by side'}</h1>"
        f'<span class="soft">written {html.escape(about["made"])} &nbsp;<button id="theme" type="button">'
        'light / dark</button></span></header><noscript><p class="mark">The charts need JavaScript; tables do not.'
        f'</p></noscript><div class="key" aria-label="How each run is drawn">{key}</div>'
    )


def _overview(runs: Sequence[RunFolder], told: Sequence[str], marks: Sequence[Sequence[str]]) -> str:
    found = [figures(run) for run in runs]
    rows = [
        ("scheme", [html.escape(run.config.parallel.scheme) for run in runs]),
        ("ranks, backend", [f"{run.ranks}, {html.escape(str(run.environment.get('backend', '-')))}" for run in runs]),
        ("steps", [_steps(run) for run in runs]),
    ]
    for name, title, shown in _ROWS:
        values = [f[name] for f in found]
        if any(value is not None for value in values):
            rows.append((title, ["-" if value is None else shown(value) for value in values]))
    rows.append(("skipped steps", [str(run.summary.get("skipped_steps", "-")) for run in runs]))
    notes = [
        f'<p class="mark">{label} has {", ".join(marked)}: do not read it beside {told[0]}.</p>'
        for label, marked in zip(told, marks)
        if marked
    ]
    return "<h2>At a glance</h2>" + "".join(notes) + _table(("", *told), rows)


def _steps(run: RunFolder) -> str:
    ended = "" if run.summary else " (has not ended)"
    early = " (stopped early)" if run.summary.get("stopped_early") else ""
    return f"{len(run.records)} of {run.config.train.steps}{ended}{early}"


def _warnings(runs: Sequence[RunFolder], told: Sequence[str]) -> str:
    parts = []
    for run, label in zip(runs, told):
        said = list(dict.fromkeys(w for r in run.records for w in r.get("warnings", [])))
        said += [w for w in run.summary.get("warnings", []) if w not in said]
        if said:
            items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in said[:20])
            more = f"<li>and {len(said) - 20} more in metrics.jsonl</li>" if len(said) > 20 else ""
            parts.append(f'<h3>{label}</h3><ul class="warnings">{items}{more}</ul>')
    return "<h2>Warnings</h2>" + ("".join(parts) or '<p class="soft">None.</p>')


def _figure(name: str, title: str, how: str, wide: bool = False, moment: int | None = None) -> str:
    """moment: number of the run whose moment is shown beside the title."""
    kind = ' class="wide"' if wide else ""
    at = "" if moment is None else f' <span class="how" id="period-{moment}"></span>'
    return (
        f'<figure{kind}><h3>{title}{at}</h3><div class="chart" id="{name}" role="img" aria-label="{title}"></div>'
        f"<figcaption>{how}</figcaption></figure>"
    )


def _curves() -> str:
    return (
        '<h2>Learning</h2><div class="tools"><label>over <select id="over"><option value="steps">steps</option>'
        '<option value="tokens">tokens</option><option value="seconds">seconds</option></select></label></div>'
        '<div class="grid">'
        + _figure(
            "loss",
            "Loss",
            "Cross-entropy of each training step. Where curves agree, one is drawn in dashes over the other.",
        )
        + _figure("validation", "Validation loss", "Held-out text; a bigram model of the same training text beside it.")
        + _figure("norm", "Gradient norm", "Before clipping, over all ranks.")
        + _figure("dead", "Experts without a row", "In all layers together, in that step.")
        + "</div>"
    )


def _maps(told: Sequence[str]) -> str:
    experts = "".join(
        _figure(f"experts-{i}", label, "1 is the mean of the layer; &times; is an expert without a row.", False, i)
        for i, label in enumerate(told)
    )
    layers = "".join(
        _figure(f"layers-{i}", label, "Busiest expert over the mean, by layer.") for i, label in enumerate(told)
    )
    ranks = "".join(_figure(f"ranks-{i}", label, "Rows computed over the mean.") for i, label in enumerate(told))
    return (
        "<h2>Load of experts</h2>"
        '<div class="tools"><label for="moment">moment of the run</label>'
        '<input id="moment" type="range" min="0" max="100" value="100" step="1"></div>'
        f'<div class="grid">{experts}</div><h2>Busiest expert over time</h2><div class="grid">{layers}</div>'
        f'<h2>Load of ranks</h2><div class="grid">{ranks}</div>'
    )


def _costs() -> str:
    return (
        '<h2>What it costs</h2><div class="grid">'
        + _figure("phases", "Time by phase", "Mean of a step after the first few; other is what no phase claims.", True)
        + _figure(
            "bytes",
            "Bytes by level",
            "What exchanges of rows send, by the level of the cluster that they cross; flat: without levels.",
            True,
        )
        + _figure("imbalance", "Busiest rank", "Rows of the busiest rank over the mean; 1 is even.")
        + _figure("local", "Rows that stay", "Share of rows whose expert is computed on their own rank.")
        + _figure("memory", "Peak memory", "Most of rank 0 so far.")
        + _figure("dropped", "Choices dropped", "By capacity; 0 without one.")
        + "</div>"
    )


def _advice(told: Sequence[str], advice: Sequence[str]) -> str:
    rows = [(label, [html.escape(text)]) for label, text in zip(told, advice)]
    return "<h2>What plan would choose</h2>" + _table(("run", "advice"), rows, text=True)


def _configs(runs: Sequence[RunFolder], told: Sequence[str]) -> str:
    flat = [_flattened(run.config.model_dump(mode="json")) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    unlike = [key for key in keys if len({json.dumps(one.get(key)) for one in flat}) > 1]
    rows = [(html.escape(key), [html.escape(json.dumps(one.get(key))) for one in flat]) for key in unlike]
    differences = _table(("setting", *told), rows, text=True) if rows else '<p class="soft">No setting differs.</p>'
    whole = "".join(
        f"<details><summary>All settings of {label}</summary><pre>"
        + html.escape(yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False))
        + "</pre></details>"
        for run, label in zip(runs, told)
    )
    return "<h2>Settings</h2>" + (differences if len(runs) > 1 else "") + whole


def _environments(runs: Sequence[RunFolder], told: Sequence[str]) -> str:
    flat = [_flattened(run.environment) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if any(one.get(key) for one in flat)]
    if not keys:
        return '<h2>Environment</h2><p class="soft">environment.json is not there: the run did not start.</p>'
    rows = [(html.escape(key), [html.escape(_plain(one.get(key))) for one in flat]) for key in keys]
    return "<h2>Environment</h2>" + _table(("", *told), rows, text=True)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flattened(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], text: bool = False) -> str:
    kind, wide = (' class="text"', " texts") if text else ("", "")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    lines = "".join(
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td{kind}>{cell}</td>" for cell in cells) + "</tr>"
        for name, cells in rows
    )
    return f'<div class="scroll{wide}"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
