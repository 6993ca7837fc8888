"""With the same weights the decoder is Qwen3-MoE of transformers: logits, losses and every gradient."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from twinmoe.backends.protocol import TrainOptions
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.end_to_end.qwen3_moe import (
    EXPERTS,
    Ours,
    Shape,
    build_qwen3,
    in_layout,
    names,
    qwen3_loss,
    random_batch,
)

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

FEW = Shape(width=64, hidden=48, layers=2, sequences=2, length=32)
MANY = replace(FEW, experts=16, top_k=4, hidden=24, tied=False)


def relative(a: np.ndarray, b: np.ndarray, floor: float = 0.0) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), floor))


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("shape", [FEW, MANY, replace(FEW, aux=0.0)], ids=["few", "many", "no balance loss"])
def test_loss_and_gradients_are_those_of_qwen3_moe(shape: Shape, experts: str) -> None:
    ours = Ours.build(load_or_skip("cpu"), shape, TrainOptions())
    theirs = build_qwen3(shape, ours.values(), experts)
    batch = random_batch(shape)
    loss = float(ours.forward_backward(batch))
    expected = qwen3_loss(theirs, batch)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    gradients = ours.backend.trainer.gradients(ours.state)
    expected_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    floor = 1e-3 * max(float(g.norm()) for g in expected_gradients.values() if g is not None)
    for name, counterpart in names(shape):
        grad = expected_gradients[counterpart]
        assert grad is not None
        assert relative(gradients[name], in_layout(name, grad.numpy()), floor) < 1e-5, name


def test_logits_are_those_of_qwen3_moe() -> None:
    seen: list[torch.Tensor] = []
    backend = load_or_skip("cpu")

    def watched(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        seen.append(logits_TV.detach())
        return backend.ops.cross_entropy(logits_TV, targets_T)

    ops: Any = SimpleNamespace(**{**vars(backend.ops), "cross_entropy": watched})
    ours = Ours.build(replace(backend, ops=ops), MANY, TrainOptions())
    theirs = build_qwen3(MANY, ours.values(), "eager")
    batch = random_batch(MANY)
    ours.forward_backward(batch)
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(batch.tokens_SL)).logits
    assert relative(seen[0].numpy(), expected.numpy().reshape(-1, MANY.vocabulary)) < 1e-5
