"""A run's folder tells what ran, and is never overwritten in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from twinmoe.backends.registry import load
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.metrics import METRICS
from twinmoe.moe_core.run_folder import (
    config_hash,
    default_run_dir,
    library_versions,
    model_hash,
    open_run_folder,
    source_commit,
    write_environment,
)

CONFIG = load_config("quickstart")


def test_a_new_folder_holds_the_whole_config(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "a" / "b", CONFIG, resume=False)
    assert load_config(yaml.safe_load((tmp_path / "a" / "b" / "config.yaml").read_text())) == CONFIG
    assert (tmp_path / "a" / "b" / "logs").is_dir()


def test_a_folder_with_steps_is_refused_unless_resumed(tmp_path: Path) -> None:
    open_run_folder(tmp_path, CONFIG, resume=False)
    open_run_folder(tmp_path, CONFIG, resume=False)
    (tmp_path / METRICS).write_text("{}\n")
    with pytest.raises(ConfigError, match=r"exists; continue it with --resume auto or choose another --run-dir"):
        open_run_folder(tmp_path, CONFIG, resume=False)
    open_run_folder(tmp_path, CONFIG, resume=True)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds other files"):
        open_run_folder(tmp_path, CONFIG, resume=True)
    with pytest.raises(ConfigError, match="is a file"):
        open_run_folder(tmp_path / "thesis.tex", CONFIG, resume=False)
    with pytest.raises(ConfigError, match="can't be made"):
        open_run_folder(tmp_path / "thesis.tex" / "run", CONFIG, resume=False)


def test_the_environment_names_versions_commit_and_hashes(tmp_path: Path) -> None:
    write_environment(tmp_path, CONFIG, load("reference", "a test"), {"data_hash": "abc"})
    known = json.loads((tmp_path / "environment.json").read_text())
    assert known["backend"] == "reference"
    assert known["decided_by"] == "a test"
    assert known["data_hash"] == "abc"
    assert known["model_hash"] == model_hash(CONFIG)
    assert "numpy" in known["versions"]
    write_environment(tmp_path, CONFIG, load("reference", "a test"))
    assert json.loads((tmp_path / "environment.json").read_text())["data_hash"] == "abc", "facts are kept"


def test_the_model_hash_is_that_of_the_function() -> None:
    running = load_config("quickstart", ["parallel.scheme=llep", "train.steps=7"])
    assert model_hash(running) == model_hash(CONFIG)
    assert config_hash(running) != config_hash(CONFIG)
    assert model_hash(load_config("quickstart", ["moe.top_k=3"])) != model_hash(CONFIG)


def test_default_folders_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = set()
    for _ in range(3):
        path = default_run_dir(CONFIG)
        path.mkdir(parents=True)
        made.add(path.name)
    assert len(made) == 3
    assert all(name.startswith("quickstart-") for name in made)


def test_versions_are_read_without_importing() -> None:
    assert library_versions()["numpy"]
    commit = source_commit()
    assert commit is None or len(commit.rstrip("+")) == 40
