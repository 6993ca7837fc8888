"""`twinmoe report`: runs side by side in one HTML file that works offline."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path

from .combinations import ConfigError
from .compare import marked, scheme_row
from .compare_figures import RunFolder, read_run
from .report_advice import advice_of
from .report_data import chart_data
from .report_page import page

MOST_RUNS = 8


def write_report(folders: Sequence[Path], out: Path) -> dict[str, object]:
    """Write the page; returns the JSON of `report`. ConfigError for folders that are no runs, or a file in the way."""
    if not 0 < len(folders) <= MOST_RUNS:
        raise ConfigError(f"report shows 1 to {MOST_RUNS} runs, not {len(folders)}; name fewer")
    runs = [read_run(folder) for folder in folders]
    labels = labels_of(runs)
    rows = marked([scheme_row(label, [run], None, []) for run, label in zip(runs, labels)])
    about = {
        "data": [chart_data(run, label) for run, label in zip(runs, labels)],
        "marks": [row["marks"] for row in rows],
        "made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "plotly": _plotly(),
        "advice": [advice_of(run) for run in runs],
    }
    try:
        out.write_text(page(runs, labels, about), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out} can't be written ({error.strerror}); name another --out") from None
    return {"file": str(out), "runs": labels, "bytes": out.stat().st_size, "marks": about["marks"]}


def labels_of(runs: Sequence[RunFolder]) -> list[str]:
    """The folders' names; with their parents where two are alike."""
    names = [run.path.resolve().name for run in runs]
    whole = [f"{run.path.resolve().parent.name}/{name}" for run, name in zip(runs, names)]
    labels = [w if names.count(name) > 1 else name for name, w in zip(names, whole)]
    return [f"{label} ({i})" if labels.count(label) > 1 else label for i, label in enumerate(labels, 1)]


def _plotly() -> str:
    try:
        return importlib.import_module("plotly.offline").get_plotlyjs()
    except ImportError:
        raise ConfigError("report needs the package plotly; install it with: pip install 'twinmoe[report]'") from None
