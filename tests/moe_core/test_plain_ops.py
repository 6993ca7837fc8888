"""A device that lacks a fused kernel: told with operator and layer, and done without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twinmoe.backends.protocol import Launch
from twinmoe.backends.registry import Backend, load
from twinmoe.moe_core import train as training
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.faults import MissingOperatorError, missing_operator
from twinmoe.moe_core.plain_ops import replaced

CONFIG = {
    "model": {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2},
    "moe": {"num_experts": 4, "expert_hidden_size": 16},
    "train": {"steps": 2, "warmup_steps": 1, "dtype": "float64", "global_batch_size": 2, "sequence_length": 16},
}


def lacking(name: str, told: str, late: bool = False) -> tuple[Backend, Callable[[], None]]:
    """`cpu` without an operation. late: like a device, the error appears when the host waits for it."""
    backend, pending = load("cpu"), list[str]()

    def missing(*inputs: Any) -> Any:
        if not late:
            raise RuntimeError(told)
        pending.append(told)
        return getattr(backend.ops, name)(*inputs)

    def synchronize() -> None:
        if pending:
            raise RuntimeError(pending.pop())

    return replace(backend, ops=replaced(backend.ops, {name: missing})), synchronize


def losses(backend: Backend, folder: Path, **train: Any) -> np.ndarray:
    config = Config.model_validate({**CONFIG, "train": {**CONFIG["train"], **train}})
    folder.mkdir()
    return np.array(training.run(config, backend, Launch(), folder)["losses"])


@pytest.mark.parametrize("name", ["expert_mlp", "combine_rows"])
def test_a_missing_kernel_is_named_with_its_layer_and_what_does_without_it(name: str, tmp_path: Path) -> None:
    backend, _ = lacking(name, "The kernel Swiglu unregistered.\n---\nC++ Call Stack")
    with pytest.raises(MissingOperatorError, match=r"rank 0: .*no kernel for Swiglu, met in layers\.0.*plain_ops=true"):
        losses(backend, tmp_path / "a")
    plain = losses(backend, tmp_path / "b", plain_ops=True)
    np.testing.assert_allclose(plain, losses(load("cpu"), tmp_path / "c"), rtol=1e-12)


def test_waiting_after_every_layer_makes_the_place_of_a_late_error_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, synchronize = lacking("expert_mlp", "The kernel Swiglu unregistered.", late=True)
    monkeypatch.setattr(type(backend.trainer), "synchronize", lambda _: synchronize())
    with pytest.raises(MissingOperatorError, match=r"met in layers\.0"):
        losses(backend, tmp_path / "a", synchronous=True)
    with pytest.raises(RuntimeError) as late:
        losses(backend, tmp_path / "b")
    assert "layers.0" not in str(late.value)


@pytest.mark.parametrize(
    ("told", "operator"),
    [
        ("The kernel GroupedMatmulV4 unregistered.", "GroupedMatmulV4"),
        ("Unsupported op [FlashAttentionScore] on CPU", "FlashAttentionScore"),
        ("aclnnMoeTokenUnpermute not in libopapi.so, or libopapi.so not found.", "aclnnMoeTokenUnpermute"),
        ("Could not run 'npu::npu_swiglu' with arguments from the 'CPU' backend.", "npu::npu_swiglu"),
        ("shapes (2, 3) and (4, 5) do not fit", None),
    ],
)
def test_the_words_of_frameworks_for_a_missing_kernel(told: str, operator: str | None) -> None:
    assert missing_operator(RuntimeError(told)) == operator
    assert missing_operator(ValueError(told)) is None
