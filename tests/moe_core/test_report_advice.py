"""What plan would choose for a run: by its own trace and a measured cluster, or a sentence about what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from twinmoe.moe_core.compare_figures import read_run
from twinmoe.moe_core.report_advice import advice_of
from twinmoe.moe_core.synthetic import Skew
from twinmoe.moe_core.trace_make import Synthetic, write
from twinmoe.testing.moe_core.run_folders import EXPERTS, write_run

MEASURED = ("cluster.levels=[{name: host, alpha: 1.0e-5, beta: 1.0e-9}]", "cluster.name=mine")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "No link of the cluster one_host was measured"),
        (MEASURED, "It can't tell: the cluster mine does not say how fast a device computes"),
        ((*MEASURED, "cluster.device_teraflops=0.01"), "a step; "),
    ],
)
def test_with_a_trace_it_is_as_much_as_the_cluster_file_allows(
    tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    folder = write_run(tmp_path / "run", words)
    (folder / "trace").mkdir()
    made = Synthetic(Skew.parse("zipf:1"), EXPERTS, 2, ranks=2, tokens=64, layers=2)
    write(folder / "trace" / "ranks_00000.twtrace", made.info, made.records())
    advice = advice_of(read_run(folder))
    assert told in advice
    assert advice.endswith("This run used ep.") == ("a step" in told)


def test_without_a_trace_it_says_how_to_get_one(tmp_path: Path) -> None:
    assert "train.trace_every=50" in advice_of(read_run(write_run(tmp_path / "run")))
