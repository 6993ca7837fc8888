"""The end of a run in a few lines."""

from __future__ import annotations

from twinmoe.moe_core.progress import summary_lines

SUMMARY = {
    "steps": 3,
    "loss_first": 2.0,
    "loss_last": 1.0,
    "tokens_per_second": 10.0,
    "world_size": 2,
    "backend": "cpu",
    "peak_memory_bytes": 0,
    "run_dir": "runs/a",
}


def test_what_resuming_has_to_say_is_told() -> None:
    resumed = {"notes": ["ranks 2 became 1", "the run was finished"]}
    told = summary_lines({**SUMMARY, "resumed": resumed})
    assert told[-2:] == resumed["notes"]
    assert told[:-2] == summary_lines({**SUMMARY, "resumed": None})
