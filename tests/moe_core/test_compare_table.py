"""The table in three forms: the same figures, marks explained under it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from twinmoe.moe_core.compare import marked, scheme_row
from twinmoe.moe_core.compare_figures import read_run
from twinmoe.moe_core.compare_table import csv_text, latex_text, text_lines
from twinmoe.testing.moe_core.run_folders import write_run


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    ep = [read_run(write_run(tmp_path / f"ep{n}", summary={"validation_loss": 3.0 + n})) for n in (0, 1)]
    other = read_run(write_run(tmp_path / "other", ["moe.top_k=3"]))
    return marked([scheme_row("ep", ep, 1.0, []), scheme_row("a_b,moe.top_k=3", [other], 1.0, [])])


def test_text_has_mean_and_spread_and_says_what_marks_mean(rows: list[dict[str, Any]]) -> None:
    text = "\n".join(text_lines(rows))
    assert "3.5000 ± 0.7071" in text
    assert "a_b,moe.top_k=3*" in text
    assert "* another model_hash" in text
    assert "± is the sample standard deviation" in text


def test_csv_holds_every_figure_unrounded(rows: list[dict[str, Any]]) -> None:
    ep, other = csv.DictReader(io.StringIO(csv_text(rows)))
    assert float(ep["validation_loss_spread"]) == pytest.approx(0.5**0.5)
    assert (ep["marks"], other["marks"], other["speed_up"]) == ("", "another model", "")
    assert ep["model_hash"] != other["model_hash"]
    assert float(ep["bytes_node"]) == 1000.0


def test_latex_is_escaped_and_marked(rows: list[dict[str, Any]]) -> None:
    text = latex_text(rows)
    assert r"a\_b,moe.top\_k=3$^{*}$ &" in text
    assert r"3.5000 $\pm$ 0.7071" in text
    assert text.count(r"\begin") == text.count(r"\end") == 1
    assert all(line.count("{") - line.count("\\{") == line.count("}") - line.count("\\}") for line in text.splitlines())
