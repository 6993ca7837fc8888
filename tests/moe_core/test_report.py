"""The page in a real browser: drawn without an error or a request, at two widths; and offline by its text."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.compare_figures import read_run
from twinmoe.moe_core.report import labels_of, write_report
from twinmoe.testing.moe_core.run_folders import record, write_run

pytest.importorskip("plotly", reason="the extra report is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a run with everything, one of another model, and one that has only begun."""
    folder = tmp_path_factory.mktemp("report")
    warned = [record(n, warnings=["step 3: <b>odd</b> & so on"] if n == 3 else []) for n in range(1, 41)]
    runs = [
        write_run(folder / "first", records=warned),
        write_run(folder / "second", ["moe.top_k=3", "parallel.scheme=llep"]),
        write_run(folder / "begun", records=[], ended=False),
    ]
    write_report(runs, folder / "report.html")
    return folder / "report.html"


def test_the_page_asks_for_nothing_and_says_what_differs(made: Path) -> None:
    text = made.read_text(encoding="utf-8")
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)  # plotly's code names addresses in strings
    assert len(own) < 100_000 < len(text) < 8_000_000
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#)\w+:?//""", own) == []
    assert "default-src 'none'" in own
    assert "second has another model" in own
    assert "begun has other data" in own, "its data are not known"
    assert "step 3: &lt;b&gt;odd&lt;/b&gt; &amp; so on" in own
    assert "<b>odd" not in own
    assert "moe.top_k" in own
    assert "0 of 100 (has not ended)" in own
    assert own.count("This run recorded no choices") == 3


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a" / "run")
    for folders, out, told in (
        ([], tmp_path / "r.html", "1 to 8"),
        ([tmp_path], tmp_path / "r.html", "no run folder"),
        ([run], tmp_path / "none" / "r.html", "another --out"),
    ):
        with pytest.raises(ConfigError, match=told):
            write_report(folders, out)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / parent / "run")) for parent in ("a", "b")]
    assert labels_of([*runs, runs[0]]) == ["a/run (1)", "b/run", "a/run (3)"]
    assert labels_of(runs[:1]) == ["run"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as play:
        yield play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (420, "dark")])
def test_a_browser_draws_it_without_an_error_or_a_request(browser: Any, made: Path, width: int, theme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    told: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(made.as_uri())
    page.wait_for_function("document.documentElement.dataset.drawn", timeout=120_000)
    drawn = {
        name: page.locator(f"#{name} .main-svg").count() > 0
        for name in ("loss", "validation", "experts-0", "experts-1", "layers-0", "ranks-1", "phases", "bytes", "memory")
    }
    assert drawn == dict.fromkeys(drawn, True)
    assert page.locator("#experts-2.empty").text_content() == "This run recorded no expert load."
    assert page.locator("#loss .scatterlayer .trace .js-line").count() == 2, (
        "a curve each but for the run that has none"
    )
    dashes = page.locator("#loss .js-line").evaluate_all("all => all.map(l => l.style.strokeDasharray)")
    assert len(set(dashes)) == 2, "runs are told apart without colour"
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#moment").fill("0")
    assert page.locator("#period-0").text_content() == "steps 1-2"
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    assert (told, [url for url in asked if url != made.as_uri() and not url.startswith(("data:", "blob:"))]) == ([], [])
    page.close()
