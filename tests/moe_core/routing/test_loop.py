"""The training loop with routers that learn, batches that are arranged and tokens that go bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.protocol import Launch
from twinmoe.backends.registry import load
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.routing.finite import NonFiniteError
from twinmoe.moe_core.train import run


def config(folder: Path, moe: dict[str, Any], mode: str = "round_robin", **train: Any) -> Config:
    """A tiny byte model on two short files of text, one a domain."""
    paths = []
    for name, text in (("a", "abcab" * 400), ("b", "vwxyz" * 400)):
        (folder / f"{name}.txt").write_text(text)
        paths.append(str(folder / f"{name}.txt"))
    model = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "tie_embeddings": True}
    sizes = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 8, "locality_nodes": 2}
    loop = {
        "steps": 4, "dtype": "float64", "global_batch_size": 4, "sequence_length": 16, "warmup_steps": 1,
        "validation_batches": 1, "save_every": 2,
    }  # fmt: skip
    return Config.model_validate(
        {
            "model": model,
            "moe": {**sizes, **moe},
            "parallel": {"data_assignment": mode},
            "train": {**loop, **train},
            "data": {"source": "text", "paths": paths, "validation_fraction": 0.3},
        }
    )


def train(settings: Config, folder: Path, resume: str | None = None) -> dict[str, Any]:
    return run(settings, load("cpu"), Launch(), folder, resume)


def test_an_assignment_moves_sequences_but_not_the_loss(tmp_path: Path) -> None:
    losses = []
    for mode in ("round_robin", "by_domain", "by_affinity"):
        (tmp_path / mode).mkdir()
        losses.append(train(config(tmp_path, {}, mode), tmp_path / mode)["losses"])
    np.testing.assert_allclose(losses[1:], losses[:1] * 2, rtol=1e-10)


def test_what_affinity_and_bias_have_learnt_survives_a_resume(tmp_path: Path) -> None:
    moe = {"locality_loss_coeff": 0.5, "bias_update_rate": 0.01, "capacity_rule": "angle_frozen"}
    settings = config(tmp_path, moe, "by_affinity")
    (tmp_path / "whole").mkdir()
    whole = train(settings, tmp_path / "whole")["losses"]
    (tmp_path / "parts").mkdir()
    resumed = train(settings, tmp_path / "parts", str(tmp_path / "whole" / "checkpoints" / "step_00000002"))
    assert resumed["losses"] == whole


def test_a_bad_token_ends_the_job_by_name(tmp_path: Path) -> None:
    settings = config(tmp_path, {})
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"init_std": float("inf")})})
    named = r"rank 0, layer 0, sequence 0 position 0 \(and"
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=named):
        train(settings, tmp_path)


def test_affinity_without_nodes_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set moe\.locality_nodes to 2 or more"):
        train(config(tmp_path, {"locality_nodes": 1}, "by_affinity"), tmp_path)
