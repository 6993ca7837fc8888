"""Home of the backend `cpu`: torch on the host, gloo between processes."""

from __future__ import annotations

import torch

from ..protocol import Launch
from . import host_ops as ops
from .comm import TorchCommunicator
from .trainer import TorchTrainer

__all__ = ["comm", "ops", "probe", "trainer"]

trainer = TorchTrainer(torch.device("cpu"))


class Gloo:
    """protocol.Comm over gloo."""

    def connect(self, launch: Launch) -> TorchCommunicator:
        return TorchCommunicator(launch, "gloo", torch.device("cpu"))


comm = Gloo()


def probe() -> tuple[bool, str, dict[str, str]]:
    """(available, reason, versions)."""
    return True, "torch runs on every host", {"torch": torch.__version__}
