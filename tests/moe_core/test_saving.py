"""Writing checkpoints: in the background or not, on disks that are full, beside what interrupted saves left."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twinmoe.moe_core import saving
from twinmoe.moe_core.checkpoint import LATEST, Checkpoint, candidates
from twinmoe.testing.end_to_end.resume_runs import layouts, order, virtual, whole_tensors, write_text


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def train(text: Path, name: str, how: str | None = None, **words: Any) -> dict[str, Any]:
    return virtual(2, {**order("laer", text, text.parent / name, **words), "resume": how})


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_saves_in_the_background_are_the_same_saves(text: Path) -> None:
    """The same files, although training goes on while they are written; the last one is there when the run ends."""
    plain, background = (train(text, str(a), save_async=a) for a in (False, True))
    assert plain["losses"] == background["losses"]
    assert names(text.parent / "True") == names(text.parent / "False") == ["step_00000002", "step_00000004"]
    for step in names(text.parent / "True"):
        found, wanted = (whole_tensors(text.parent / n / "checkpoints" / step, "laer", text) for n in ("True", "False"))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(found[key], value)


def test_the_newest_are_kept(text: Path) -> None:
    train(text, "run", save_every=1, keep_last=2)
    assert names(text.parent / "run") == ["step_00000003", "step_00000004"]
    assert (text.parent / "run" / LATEST).read_text() == "step_00000004\n"


@pytest.mark.parametrize("layout", layouts(2, "reference"))
def test_the_last_step_is_saved_and_a_finished_run_goes_on_as_a_sentence(text: Path, layout: str) -> None:
    """Under every scheme, where save_every does not divide the steps."""
    run = text.parent / "run"
    words: dict[str, Any] = {"steps": 3, "save_every": 2, "keep_last": 1}
    first = virtual(2, order(layout, text, run, **words))
    assert names(run) == ["step_00000003"]
    assert (run / LATEST).read_text() == "step_00000003\n"
    inodes = {path: path.stat().st_ino for path in (run / "checkpoints").rglob("*")}
    again = virtual(2, {**order(layout, text, run, **words), "resume": "auto"})
    assert again["losses"] == first["losses"]
    assert again["resumed"]["bitwise"]
    assert "finished: it is at step 3 of train.steps=3" in again["resumed"]["notes"][-1]
    assert {path: path.stat().st_ino for path in (run / "checkpoints").rglob("*")} == inodes
    whole = virtual(2, {**order(layout, text, run, **{**words, "steps": 4}), "resume": "auto"})
    assert whole["resumed"]["step"] == 3
    assert len(whole["losses"]) == whole["steps"] == 4
    assert names(run) == ["step_00000004"]


def test_nothing_is_saved_where_that_is_not_asked(text: Path) -> None:
    train(text, "run", save_every=0)
    assert not (text.parent / "run" / "checkpoints").exists()


def test_what_interrupted_saves_left_and_steps_that_were_taken_back_go(text: Path) -> None:
    train(text, "run", save_every=1)
    checkpoints = text.parent / "run" / "checkpoints"
    for left in ("step_00000003.tmp", "step_00000002.old"):
        (checkpoints / left).mkdir()
        (checkpoints / left / "rank_00000.safetensors").write_bytes(b"half")
    (checkpoints.parent / LATEST).write_text("step_00000002\n")
    train(text, "run", "auto", save_every=1, steps=3)
    assert names(text.parent / "run") == ["step_00000001", "step_00000002", "step_00000003"], "4 was of another run"
    assert Checkpoint(checkpoints / "step_00000003").step == 3


@pytest.mark.parametrize("background", [False, True])
def test_one_ranks_full_disk_gives_the_save_up_on_all(
    text: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    write = saving._write

    def full(folder: Path, rank: int, *rest: Any) -> None:
        if rank == 1 and folder.name == "step_00000002.tmp":
            (folder / "rank_00001.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, rank, *rest)

    monkeypatch.setattr(saving, "_write", full)
    summary = train(text, "run", save_every=1, save_async=background)
    assert names(text.parent / "run") == ["step_00000001", "step_00000003", "step_00000004"]
    (told,) = summary["warnings"]
    assert told.startswith("the checkpoint of step 2 was NOT written: No space left on device on rank 1; training goes")
    assert "the last checkpoint is step_00000001" in told


@pytest.mark.parametrize("background", [False, True])
def test_an_error_that_is_no_full_disk_ends_the_run(
    text: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    def broken(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "no entry")

    monkeypatch.setattr(saving, "_write", broken)
    with pytest.raises(PermissionError):
        train(text, "run", save_async=background)


@pytest.mark.parametrize("point", ["before the rename", "before latest moves"])
def test_a_save_cut_short_leaves_the_one_before(text: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    class CutError(Exception):
        pass

    take_place = saving._take_place

    def cut(temporary: Path, final: Path) -> None:
        if final.name == "step_00000004":
            if point == "before latest moves":
                take_place(temporary, final)
            raise CutError
        take_place(temporary, final)

    monkeypatch.setattr(saving, "_take_place", cut)
    with pytest.raises(CutError):
        train(text, "run")
    best = candidates(text.parent / "run", "auto")[0]
    assert best.name == "step_00000002"
    assert Checkpoint(best).step == 2
    monkeypatch.undo()
    unbroken = train(text, "unbroken")
    assert train(text, "run", "auto")["losses"] == unbroken["losses"]
    assert names(text.parent / "run") == ["step_00000002", "step_00000004"]


def test_saving_a_step_again_replaces_it_and_at_no_moment_neither_is_there(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(text, "run")
    seen, rename = [], Path.rename

    def watched(path: Path, target: Any) -> Path:
        done = rename(path, target)
        seen.append([p.name for p in (text.parent / "run" / "checkpoints").glob("step_00000004*")])
        return done

    (text.parent / "run" / LATEST).write_text("step_00000002\n")
    monkeypatch.setattr(Path, "rename", watched)
    train(text, "run", "auto")
    assert seen
    assert all({"step_00000004", "step_00000004.old"} & set(names) for names in seen)
    assert names(text.parent / "run") == ["step_00000002", "step_00000004"]
