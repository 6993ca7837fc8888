"""`trainer` of `ascend-torch`: torch's, on this process's NPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...backends.protocol import Communicator, Component, Group, TrainOptions
from ...backends.torch_shared.trainer import TorchState, TorchTrainer
from .ops import check_dtype


class NpuTrainer(TorchTrainer):
    """protocol.Trainer on NPUs."""

    def build(
        self, components: Sequence[Component], options: TrainOptions, groups: Mapping[str, Group], comm: Communicator
    ) -> TorchState:
        """Make the modules, draw the parameters, prepare the optimizer. ValueError for float64."""
        check_dtype(options.dtype)
        return super().build(components, options, groups, comm)

    def sum_of(self, part: Tensor, comm: Communicator, group: Group) -> float:
        """Summed on the host in rank order: NPUs have next to no float64."""
        return float(comm.gather_to_host(np.array([float(part)]), group).sum())


def make() -> NpuTrainer:
    """On whichever NPU `comm.connect` has chosen."""
    return NpuTrainer(torch.device("npu"))
