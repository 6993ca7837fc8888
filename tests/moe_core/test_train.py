"""The loop's decisions are the same on every rank, whenever it is that one of them is asked something."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from twinmoe.backends.protocol import Launch
from twinmoe.backends.registry import Backend
from twinmoe.moe_core import train
from twinmoe.testing.end_to_end.resume_runs import carry_out, order, write_text
from twinmoe.testing.processes import run_processes

ASKED = 2
"""The step in which rank 1 is asked to stop."""


def asked_at(moment: str, rank: int) -> type[train.Session]:
    """A session that gets SIGTERM's handler called on rank 1 at a moment of step ASKED."""

    class Asked(train.Session):
        def train_step(self) -> dict[str, Any]:
            record = super().train_step()
            self._ask("after the step", self.step)
            return record

        def _gather(self, totals: Any) -> Any:
            self._ask("before the gather", self.step + 1)
            summary = super()._gather(totals)
            self._ask("after the gather", self.step + 1)
            return summary

        def _ask(self, now: str, step: int) -> None:
            if (now, step, self.comm.rank) == (moment, ASKED, rank):
                self.ask_to_stop()

    return Asked


def stopped(backend: Backend, launch: Launch, moments: dict[str, Any]) -> dict[str, Any]:
    """One run a moment; where each ended."""
    found = {}
    for number, (moment, one) in enumerate(moments.items()):
        here = Launch(launch.rank, launch.size, launch.rank, launch.size, port=launch.port + number, timeout_s=30)
        with mock.patch.object(train, "Session", asked_at(moment, 1)):
            summary = carry_out(backend, here, [one])["summaries"][0]
        found[moment] = [summary["steps"], summary["stopped_early"]]
    return found


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_ranks_stop_at_one_step_whenever_one_is_asked(tmp_path: Path) -> None:
    """A request that comes too late for a step's gather is heard in the next one: not lost, not obeyed alone."""
    text = write_text(tmp_path / "text.txt")
    ends = {"before the gather": ASKED, "after the gather": ASKED + 1, "after the step": ASKED + 1}
    orders = {moment: order("ep", text, tmp_path / moment, steps=9, save_every=ASKED) for moment in ends}
    found = run_processes(2, "twinmoe.testing.moe_core.test_train:stopped", {"moments": orders}, seconds=100)
    assert found == {moment: [step, True] for moment, step in ends.items()}
    for moment, step in ends.items():
        assert (tmp_path / moment / "latest").read_text().strip() == f"step_{step:08d}"
