"""Reading checkpoints: everything is accounted for, and nothing that is damaged or foreign is taken."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from twinmoe.backends.protocol import Group, Parameter
from twinmoe.moe_core.checkpoint import LATEST, MANIFEST, SUMS, Checkpoint, CheckpointError, candidates
from twinmoe.moe_core.checkpoint import logical_shapes as shapes_of
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.saving import publish, write_shard
from twinmoe.moe_core.shapes import declared
from twinmoe.testing.end_to_end.resume_runs import config, order, virtual, write_text


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two virtual ranks under `laer`, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    virtual(2, order("laer", write_text(folder / "text.txt"), folder / "run"))
    return folder / "run"


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path / "run"


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step_00000004"


def files() -> list[str]:
    return [MANIFEST, SUMS, "rank_00000.safetensors", "rank_00001.safetensors"]


def resume(run_dir: Path, how: str) -> dict[str, Any]:
    """Go on with one step more."""
    return virtual(2, order("laer", run_dir.parent / "text.txt", run_dir, how, steps=5))  # type: ignore[arg-type]


# --- what is in it -------------------------------------------------------------------------------
def test_other_tools_read_it(run_dir: Path) -> None:
    """safetensors opens the data files, and SHA256SUMS is what sha256sum writes."""
    folder = newest(run_dir)
    lines = (folder / SUMS).read_text().splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == sorted(f for f in files() if f != SUMS)
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    stored = {key for name in files()[2:] for key in load_file(folder / name)}
    manifest = json.loads((folder / MANIFEST).read_text())
    assert stored == {entry["key"] for entry in manifest["tensors"]}
    assert {"step", "config", "data", "model_hash", "router_states", "placements", "versions", "files"} <= set(manifest)
    assert all({"shape", "dtype", "file"} <= set(entry) for entry in manifest["tensors"])


def test_every_rank_writes_a_share_of_what_all_have(tmp_path: Path) -> None:
    """The model is never gathered in one file: replicated tensors are dealt out."""
    text = write_text(tmp_path / "text.txt")
    virtual(4, order("ep", text, tmp_path / "run"))
    sizes = [path.stat().st_size for path in sorted(newest(tmp_path / "run").glob("*.safetensors"))]
    assert len(sizes) == 4
    assert max(sizes) < 0.5 * sum(sizes)


def test_it_is_small_next_to_its_tensors(run_dir: Path) -> None:
    """No pickle, no code: JSON and raw numbers."""
    for path in newest(run_dir).iterdir():
        assert path.suffix in (".json", ".safetensors") or path.name == SUMS


# --- damage --------------------------------------------------------------------------------------
def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flip,
    "a missing byte": cut,
    "an empty file": lambda path: path.write_bytes(b""),
    "no file": Path.unlink,
}


@pytest.mark.parametrize("damage", list(DAMAGE))
@pytest.mark.parametrize("name", files())
def test_damage_to_any_file_is_refused_by_name(copy: Path, name: str, damage: str) -> None:
    DAMAGE[damage](newest(copy) / name)
    with pytest.raises(CheckpointError, match=r"take an older checkpoint") as told:
        Checkpoint(newest(copy))
    assert str(newest(copy)) in str(told.value)
    assert "\n" not in str(told.value)


@settings(max_examples=300)
@given(data=st.data())
def test_any_flipped_bit_anywhere_is_refused(run_dir: Path, data: st.DataObject) -> None:
    """Fuzz: one bit of one file, the checksums' own file included; or the rest of the file is lost."""
    path = newest(run_dir) / data.draw(st.sampled_from(files()))
    whole = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    broken = bytearray(whole)
    broken[place] ^= 1 << bit
    if data.draw(st.booleans()):
        broken = broken[:place]
    try:
        path.write_bytes(broken)
        with pytest.raises(CheckpointError):
            Checkpoint(newest(run_dir))
    finally:
        path.write_bytes(whole)


def test_ranks_share_the_verification(copy: Path, run_dir: Path) -> None:
    """Each verifies its part of the data files; what one finds, all refuse in its words."""
    shutil.copy(run_dir.parent / "text.txt", copy.parent / "text.txt")
    flip(newest(copy) / "rank_00001.safetensors")
    Checkpoint(newest(copy), (0, 2))
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors is damaged"):
        Checkpoint(newest(copy), (1, 2))
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors is damaged"):
        resume(copy, str(newest(copy)))


def test_auto_takes_the_newest_whole_one_and_says_what_it_skipped(copy: Path, run_dir: Path) -> None:
    shutil.copy(run_dir.parent / "text.txt", copy.parent / "text.txt")
    flip(newest(copy) / "rank_00001.safetensors")
    resumed = resume(copy, "auto")["resumed"]
    assert resumed["step"] == 2
    assert "rank_00001.safetensors is damaged (checksum); take an older checkpoint: skipped" in resumed["notes"][0]
    for path in (copy / "checkpoints").glob("step_*"):
        flip(path / SUMS)
    with pytest.raises(CheckpointError, match=r"step_00000004.*step_00000002|step_00000005.*step_00000002"):
        resume(copy, "auto")


def test_nothing_is_changed_before_everything_is_checked(copy: Path, run_dir: Path) -> None:
    """A checkpoint of another model fails before a single tensor is written."""
    text = shutil.copy(run_dir.parent / "text.txt", copy.parent / "text.txt")
    changed = {**order("laer", Path(text), copy.parent / "other", newest(copy))}
    changed["config"]["moe"]["expert_hidden_size"] = 4
    with pytest.raises(CheckpointError, match="model_hash"):
        virtual(2, changed)
    for train, told in (({"seed": 5}, "train.seed"), ({"global_batch_size": 8}, "train.global_batch_size")):
        with pytest.raises(CheckpointError, match=told):
            virtual(2, order("laer", Path(text), copy.parent / "other", newest(copy), **train))
    write_text(Path(text)).write_text("other words " * 500)
    with pytest.raises(CheckpointError, match="data_hash"):
        virtual(2, order("laer", Path(text), copy.parent / "other", newest(copy)))


# --- accounting ----------------------------------------------------------------------------------
def logical(run_dir: Path) -> dict[str, tuple[int, ...]]:
    settled = Config.model_validate(config("laer", run_dir.parent / "text.txt"))
    return shapes_of(declared(settled, Mesh()))


def test_every_tensor_is_accounted_for(run_dir: Path) -> None:
    checkpoint, shapes = Checkpoint(newest(run_dir)), logical(run_dir)
    checkpoint.check_complete(shapes)
    name = next(iter(shapes))
    with pytest.raises(CheckpointError, match=f"holds {name}, which this model does not have"):
        checkpoint.check_complete({n: s for n, s in shapes.items() if n != name})
    with pytest.raises(CheckpointError, match="lacks parameter of brand_new"):
        checkpoint.check_complete({**shapes, "brand_new": (3,)})
    with pytest.raises(CheckpointError, match=f"{name} has shape"):
        checkpoint.check_complete({**shapes, name: (1, *shapes[name])})


@pytest.mark.parametrize("kind", ["exp_avg", "parameter"])
def test_a_kind_that_lacks_one_tensor_is_refused(copy: Path, kind: str) -> None:
    checkpoint = Checkpoint(newest(copy))
    key = next(key for key in checkpoint._entries if key[0] == kind)
    del checkpoint._entries[key]
    with pytest.raises(CheckpointError, match=f"lacks {kind} of {key[1]}"):
        checkpoint.check_complete(logical_of(copy))


def logical_of(run_dir: Path) -> dict[str, tuple[int, ...]]:
    return {
        name: entries[0].shape
        for (_, name), entries in Checkpoint(newest(run_dir))._entries.items()
        if "." in name and not name.startswith("planners")
    }


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that somebody wrote by hand, with right checksums."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    sums = {MANIFEST: hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(), **manifest["files"]}
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def part_of_an_expert(manifest: dict[str, Any]) -> dict[str, Any]:
    return next(entry for entry in manifest["tensors"] if entry["stop"] is not None)


FORGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a part is missing": (lambda m: m["tensors"].remove(part_of_an_expert(m)), "a part of|do not fit"),
    "a part comes twice": (lambda m: m["tensors"].append(part_of_an_expert(m)), "do not fit"),
    "another shape": (lambda m: part_of_an_expert(m).update(shape=[2, 2]), "do not fit|the manifest says|shape"),
    "a path": (lambda m: m["files"].update({"../../rank_00000.safetensors": "0" * 64}), "SHA256SUMS is damaged"),
    "a path of an entry": (lambda m: m["tensors"][0].update(file="/etc/passwd"), "names the file '/etc/passwd'"),
    "another format": (lambda m: m.update(format=99), "has format 99"),
}


@pytest.mark.parametrize("what", list(FORGED))
def test_a_forged_manifest_is_refused(copy: Path, what: str) -> None:
    change, told = FORGED[what]
    rewritten(newest(copy), change)
    with pytest.raises(CheckpointError, match=told):
        list(
            Checkpoint(newest(copy)).values(
                {p.name: p for p in declared(Config.model_validate(config("laer", copy)), Mesh())}
            )
        )


# --- finding it ----------------------------------------------------------------------------------
def test_candidates_are_the_latest_then_the_others(copy: Path) -> None:
    steps = [copy / "checkpoints" / f"step_{n:08d}" for n in (4, 2)]
    assert candidates(copy, None) == []
    assert candidates(copy, "auto") == steps
    (copy / LATEST).write_text("step_00000002\n")
    assert candidates(copy, "auto") == steps[::-1], "the pointer decides"
    assert candidates(copy.parent, str(copy)) == [steps[1]]
    assert candidates(copy.parent, str(steps[0])) == [steps[0]]
    (copy / LATEST).unlink()
    assert candidates(copy, "auto") == steps
    (copy / LATEST).write_text("step_00000007")
    assert candidates(copy, "auto") == steps, "what it names is gone"
    assert candidates(copy.parent / "new", "auto") == [], "a first start"
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        candidates(copy, str(copy.parent))


@pytest.mark.parametrize("name", ["../../etc", "/etc", "step_1", "step_00000004/../..", "step_00000004\nx", "\udcff"])
def test_a_pointer_out_of_the_folder_is_refused(copy: Path, name: str) -> None:
    (copy / LATEST).write_bytes(name.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="is not the name of a checkpoint"):
        candidates(copy, "auto")


# --- other models and sizes ----------------------------------------------------------------------
def test_a_stack_without_experts_and_numbers_of_no_dimension_survive(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "new").mkdir(parents=True)
    specs = {
        "w": Parameter("w", (2, 3), lambda: np.zeros((2, 3))),
        "none": Parameter("none", (0, 3), lambda: np.zeros((0, 3))),
    }
    groups = {"world": Group("world", (0,), 0)}
    tensors = [("w", "parameter", np.arange(6.0).reshape(2, 3).T.copy().T), ("none", "parameter", np.zeros((0, 3)))]
    state = {"call": np.array(7), "window": np.zeros((0, 2, 3), np.int64)}
    write_shard(tmp_path / "checkpoints" / "new", 0, specs, groups, tensors, state)
    final = tmp_path / "checkpoints" / "step_00000001"
    publish(tmp_path / "checkpoints" / "new", final, 1, {"step": 1, "updates": 1})
    checkpoint = Checkpoint(final)
    found = {name: value for name, _, value in checkpoint.values(specs)}
    np.testing.assert_array_equal(found["w"], np.arange(6.0).reshape(2, 3))
    assert found["none"].shape == (0, 3)
    assert checkpoint.state()["call"] == 7
    assert checkpoint.state()["call"].shape == ()
    assert checkpoint.state()["window"].shape == (0, 2, 3)


# --- manifests that somebody made up -----------------------------------------------------------------
def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a JSON value; of long lists the first two."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [path, *(p for key, part in inside for p in places(part, (*path, key)))]


def changed(manifest: dict[str, Any], path: tuple[Any, ...], new: Any) -> dict[str, Any]:
    """Another value at the path; ... takes the place out."""
    found = json.loads(json.dumps(manifest))
    holder = found
    for key in path[:-1]:
        holder = holder[key]
    if new is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return found


FOREIGN = (..., None, -1, 0, 1.5, 10**12, "", "x", [], [[]], {}, {"a": 1}, True, "../x")


@settings(max_examples=120)
@given(data=st.data())
def test_a_made_up_manifest_is_refused_or_taken_but_never_an_accident(run_dir: Path, data: st.DataObject) -> None:
    """Fuzz: any value of it missing or of another kind, with right checksums."""
    folder = newest(run_dir)
    kept = {name: (folder / name).read_bytes() for name in (MANIFEST, SUMS)}
    manifest = json.loads(kept[MANIFEST])
    path = data.draw(st.sampled_from(places(manifest)[1:]))
    forged = changed(manifest, path, data.draw(st.sampled_from(FOREIGN)))
    text = run_dir.parent / "text.txt"
    try:
        (folder / MANIFEST).write_text(json.dumps(forged))
        files = forged.get("files")
        sums = {MANIFEST: hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()}
        sums |= {n: d for n, d in files.items() if isinstance(d, str)} if isinstance(files, dict) else {}
        (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        told = resumed_or_refused(text, folder)
        assert told
        assert "\n" not in told
    finally:
        for name, content in kept.items():
            (folder / name).write_bytes(content)


def resumed_or_refused(text: Path, folder: Path) -> str:
    """Go on with two steps after a checkpoint of four; or the sentence by which it is refused."""
    with tempfile.TemporaryDirectory() as other:
        try:
            summary = virtual(2, order("laer", text, Path(other) / "run", folder, save_every=0, steps=6))
        except CheckpointError as error:
            return str(error)
    assert summary["steps"] == len(summary["losses"]) == 6
    return "resumed"
