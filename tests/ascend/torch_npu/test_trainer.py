"""The trainer of `ascend-torch`, on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from twinmoe.ascend.torch_npu.trainer import NpuTrainer
from twinmoe.backends.protocol import Group, TrainOptions


def test_norms_of_ranks_are_summed_on_the_host() -> None:
    """No float64 tensor reaches the NPU or HCCL."""
    gathered: list[Any] = []

    class Comm:
        def gather_to_host(self, x: np.ndarray, group: Group) -> np.ndarray:
            gathered.append(x.dtype)
            return np.stack([x, x + 1])

    found = NpuTrainer(torch.device("cpu")).sum_of(torch.tensor(2.5), Comm(), Group("world", (0, 1), 0, None))  # type: ignore[arg-type]
    assert found == 6.0
    assert gathered == [np.float64]


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        NpuTrainer(torch.device("cpu")).build([], TrainOptions(dtype="float64"), {}, None)  # type: ignore[arg-type]
