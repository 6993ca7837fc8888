"""Nodes as network namespaces: they carry a job, and nothing of them is left, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from twinmoe.moe_core.bench_comm import CommRequest, run
from twinmoe.moe_core.bench_job import Where
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.testbed import Shape, Testbed, run_ranks, unavailable

REASON = unavailable()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=str(REASON))
pytestmark = pytest.mark.processes


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith(f"twinmoe_{os.getpid()}_")}


@pytest.fixture
def nothing_left() -> Iterator[None]:
    yield
    assert namespaces() == set()


def test_shapes_and_rates_are_checked_before_anything_is_made():
    assert Shape.parse("2x4", "200mbit") == Shape(2, 4, "200mbit")
    for text, rate, told in (("2", None, "NODESxRANKS"), ("0x2", None, "NODESxRANKS"), ("2x2", "fast", "not a rate")):
        with pytest.raises(ConfigError, match=told):
            Shape.parse(text, rate)
    with pytest.raises(ConfigError, match="add --testbed"):
        _ = Where(rate="200mbit").shape


@needs_namespaces
def test_ranks_of_a_node_see_each_other_and_the_other_node(nothing_left: None, tmp_path: Path):
    with Testbed(Shape(2, 1)) as testbed:
        assert len(namespaces()) == 3
        script = "import os, subprocess, sys; print(os.environ['RANK'], os.environ['MASTER_ADDR'], flush=True)"
        assert run_ranks(testbed, [sys.executable, "-c", script], dict(os.environ), 29650, tmp_path / "log", 30) == [
            0,
            0,
        ]
    assert sorted((tmp_path / "log").read_text().split("\n")) == ["", "0 10.77.0.1", "1 10.77.0.1"]


@needs_namespaces
def test_an_exception_leaves_no_namespace_behind(nothing_left: None):
    with pytest.raises(RuntimeError, match="planted"), Testbed(Shape(2, 1, "100mbit")):
        raise RuntimeError("planted")


@needs_namespaces
def test_a_failing_rank_ends_the_others(nothing_left: None, tmp_path: Path):
    script = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    start = time.monotonic()
    with Testbed(Shape(2, 1)) as testbed:
        statuses = run_ranks(testbed, [sys.executable, "-c", script], dict(os.environ), 29650, tmp_path / "log", 60)
    assert statuses == [-9, 3]
    assert time.monotonic() - start < 30


@needs_namespaces
def test_ranks_that_do_not_end_are_ended(nothing_left: None, tmp_path: Path):
    with Testbed(Shape(1, 1)) as testbed, pytest.raises(TimeoutError, match="did not end within"):
        run_ranks(testbed, [sys.executable, "-c", "import time; time.sleep(60)"], {}, 29650, tmp_path / "log", 1.0)


@needs_namespaces
def test_a_terminated_command_leaves_no_namespace_behind(tmp_path: Path):
    script = (
        "import time; from twinmoe.moe_core.testbed import *\n"
        "with Testbed(Shape(2, 1)):\n    print('ready', flush=True)\n"
        "    while True: time.sleep(0.05)"  # a signal just before one long sleep would be seen after it only
    )
    command = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert command.stdout is not None
    assert command.stdout.readline() == b"ready\n"
    command.terminate()
    assert command.wait(30) == 128 + signal.SIGTERM
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"twinmoe_{command.pid}_" not in listed


@needs_namespaces
def test_namespaces_of_a_dead_process_are_removed_by_the_next_testbed():
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = f"twinmoe_{dead.pid}_0"
    subprocess.run(["ip", "netns", "add", stale], check=True)
    with Testbed(Shape(1, 1)):
        pass
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert stale not in listed


@needs_namespaces
def test_collectives_between_shaped_nodes_take_the_time_of_the_link(nothing_left: None):
    where = Where(testbed="2x1", rate="100mbit", timeout_s=120)
    report = run(CommRequest(where, None, True, sizes=(1 << 18, 1 << 20), repeats=3, collectives=("all_to_all",)))
    assert [level["name"] for level in report["cluster"]["levels"]] == ["node", "cluster"]
    milliseconds = {row["bytes"]: row["milliseconds"] for row in report["rows"]}
    crossing = 8 * (1 << 19) / 100e6 * 1e3  # half of a rank's buffer goes to the other node
    assert 0.8 * crossing < milliseconds[1 << 20] < 3 * crossing
    (line,) = report["fit"]
    assert line["beta"] > 0
