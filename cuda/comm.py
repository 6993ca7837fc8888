"""`comm` of `cuda`: NCCL, one GPU per process."""

from __future__ import annotations

import torch

from ..backends.protocol import Launch
from ..backends.torch_shared.comm import TorchCommunicator


def connect(launch: Launch) -> TorchCommunicator:
    """Join the job that `launch` describes on the GPU of this process's local rank."""
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return TorchCommunicator(launch, "nccl", device)
