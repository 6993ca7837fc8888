"""A model of transformers, started from its folder, is the same function here: logits, loss and every gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from twinmoe.testing.conftest import load_or_skip

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

from twinmoe.testing.end_to_end.huggingface import (
    MODELS,
    Ours,
    gradients_in_our_layout,
    make_theirs,
    random_batch,
    their_step,
)


@pytest.mark.parametrize("backend", ["cpu", "mindspore-cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_those_of_transformers(name: str, backend: str, tmp_path: Path) -> None:
    theirs, batch = make_theirs(name), random_batch()
    theirs.save_pretrained(tmp_path / "model")
    ours = Ours.start(load_or_skip(backend), tmp_path / "model", batch)
    expected_logits, expected_loss = their_step(theirs, batch)
    loss = ours.forward_backward(batch)
    np.testing.assert_allclose(ours.logits[0], expected_logits, rtol=0, atol=1e-5)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    expected = gradients_in_our_layout(theirs, tmp_path / "gradients")
    gradients = ours.backend.trainer.gradients(ours.state)
    parameters = ours.model.parameters
    assert set(gradients) == set(parameters)
    largest = max(float(np.linalg.norm(g)) for g in gradients.values())
    for key, parameter in parameters.items():
        wanted = expected.local(parameter)
        off = float(np.linalg.norm(gradients[key] - wanted)) / max(float(np.linalg.norm(wanted)), 1e-3 * largest)
        assert off < 1e-5, f"{key}: {off:.1e}"
