"""Trackers by name: those that come along, those of installed packages, and what is said of others."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.trackers import check_trackers, open_trackers


def test_tensorboard_is_the_default_and_gets_scalars(tmp_path: Path) -> None:
    names = load_config("quickstart").train.trackers
    assert names == ("tensorboard",)
    (board,) = open_trackers(names, tmp_path, {})
    board.write(3, {"loss": 2.5, "phases/data": 0.5})
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = {tag: events.Tensors(tag)[0] for tag in events.Tags()["tensors"]}
    assert set(values) == {"loss", "phases/data"}
    assert values["loss"].step == 3
    assert values["phases/data"].tensor_proto.float_val[0] == pytest.approx(0.5)


def test_wandb_continues_the_run_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with wandb's three calls: the same folder gives the same id."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, scalars: dict[str, float], step: int) -> None:
            calls.append(("log", (step, scalars)))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(**settings: Any) -> Run:
        calls.append(("init", settings))
        return Run()

    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        (tracker,) = open_trackers(("wandb",), tmp_path, {"name": "small"})
        tracker.write(1, {"loss": 2.0})
        tracker.close()
    first, again = (told for name, told in calls if name == "init")
    assert first == again
    assert (first["resume"], first["dir"], first["config"]) == ("allow", str(tmp_path), {"name": "small"})
    assert ("log", (1, {"loss": 2.0})) in calls
    assert calls[-1] == ("finish", None)


def test_an_installed_package_offers_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[twinmoe.trackers]\nmine = mine_tracker:Mine\n")
    (tmp_path / "mine_tracker.py").write_text(
        "class Mine:\n"
        "    def begin(self, run_dir, about): self.told = [about['name']]\n"
        "    def write(self, step, scalars): self.told.append(step)\n"
        "    def close(self): self.told.append('closed')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tracker,) = open_trackers(("mine",), tmp_path, {"name": "small"})
    tracker.write(1, {})
    tracker.close()
    assert tracker.told == ["small", 1, "closed"]  # type: ignore[attr-defined]


def test_names_that_lead_nowhere_are_refused_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"nosuch is unknown; choose among .*tensorboard, wandb"):
        check_trackers(("tensorboard", "nosuch"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_trackers(("wandb",))
