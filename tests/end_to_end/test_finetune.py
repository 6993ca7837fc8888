"""`model.init_from`: a Hugging Face model trains on under every scheme, and goes back to transformers."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twinmoe.moe_core import cli
from twinmoe.moe_core.compose import load_config
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.processes import run_processes

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

from twinmoe.testing.end_to_end.huggingface import Ours, make_theirs, random_batch, their_step

pytestmark = pytest.mark.processes

TRAIN = {
    "steps": 3,
    "warmup_steps": 1,
    "dtype": "float64",
    "global_batch_size": 4,
    "sequence_length": 16,
    "validation_batches": 1,
}
LENT = {"planner": "least_loaded", "residency": "borrowed", "least_loaded": {"min_rows": 1}}
LENT["least_loaded"] |= {"imbalance_threshold": "1"}
SHARDED = {"planner": "relayout", "residency": "fully_sharded", "slots_per_rank": 4}
SCHEMES: list[dict[str, Any]] = [{}, LENT, SHARDED, {"data_sharding": "full"}, {"placement": "swap"}]


def losses(ranks: int, folder: Path, schemes: list[dict[str, Any]], text: Path) -> list[np.ndarray]:
    data = {"source": "text", "paths": [str(text)]}
    base = {"model": {"init_from": str(folder)}, "train": TRAIN, "data": data}
    configs = [load_config({**base, "parallel": scheme}).model_dump(mode="json") for scheme in schemes]
    with tempfile.TemporaryDirectory() as place:
        arguments = {"configs": configs, "folder": place}
        result = run_processes(ranks, "twinmoe.testing.end_to_end.targets:train", arguments, "cpu")
    return [np.array([*s["losses"], s["validation_loss"]]) for s in result["summaries"]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models whose vocabulary holds bytes, and a text."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("gpt_oss", "qwen2_moe mixed"):
        make_theirs(name, vocab_size=257).save_pretrained(folder / name)
    (folder / "text.txt").write_text("a text of no great length, again and again, " * 60)
    return folder


@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("qwen2_moe mixed", marks=pytest.mark.slow)])
def test_losses_do_not_depend_on_ranks_or_schemes(name: str, models: Path) -> None:
    alone = losses(1, models / name, [{}], models / "text.txt")[0]
    assert alone[0] > alone[-1]
    for scheme, found in zip(SCHEMES, losses(2, models / name, SCHEMES, models / "text.txt"), strict=True):
        np.testing.assert_allclose(found, alone, rtol=1e-9, err_msg=str(scheme))


@pytest.mark.slow
def test_a_trained_model_goes_back_to_transformers(models: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    origin, run_dir = shutil.copytree(models / "gpt_oss", tmp_path / "origin"), tmp_path / "run"
    words = [f"model.init_from={origin}", "train.steps=2", "train.save_every=2", "train.learning_rate=0.01"]
    words += ["train.global_batch_size=2", "train.micro_batch_size=null", "train.sequence_length=16"]
    words += ["train.dtype=float32", "backend=cpu", "data.source=text", f"data.paths=[{models / 'text.txt'}]"]
    assert cli.run(["train", "finetune_llep", *words, "--nproc", "2", "--run-dir", str(run_dir)]) == 0
    assert cli.run(["convert", "to-hf", str(run_dir), str(tmp_path / "trained")]) == 0
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "trained", attn_implementation="eager", dtype=torch.float32
    )
    batch = random_batch(257)
    ours = Ours.start(load_or_skip("cpu"), run_dir, batch)
    ours.forward_backward(batch)
    logits = their_step(theirs, batch)[0]
    np.testing.assert_allclose(ours.logits[0], logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    before = Ours.start(load_or_skip("cpu"), origin, batch)
    before.forward_backward(batch)
    assert np.abs(before.logits[0] - logits).max() > 1e-2
    shutil.rmtree(origin)
    words = ["train", str(run_dir / "config.yaml"), "train.steps=3", "--nproc", "2", "--run-dir", str(run_dir)]
    assert cli.run([*words, "--resume", "auto"]) == 0, "a run goes on without the folder that it started from"


def test_a_run_does_not_need_the_folder_again(models: Path) -> None:
    written = load_config({"model": {"init_from": str(models / "gpt_oss")}}).model_dump(mode="json")
    written["model"]["init_from"] = "gone"
    assert load_config(json.loads(json.dumps(written))).model.num_layers == 3
