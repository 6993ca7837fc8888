"""`trainer` of `ascend-torch`: torch's, on this process's NPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

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


def make() -> NpuTrainer:
    """On whichever NPU `comm.connect` has chosen."""
    return NpuTrainer(torch.device("npu"))
