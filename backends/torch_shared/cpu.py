"""Home of the backend `cpu`: torch on the host, gloo between processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..protocol import Launch
from . import host_ops as ops
from .comm import TorchCommunicator
from .trainer import TorchTrainer

__all__ = ["comm", "ops", "probe", "trainer", "worker_environment"]

trainer = TorchTrainer(torch.device("cpu"))


class Gloo:
    """protocol.Comm over gloo."""

    def connect(self, launch: Launch) -> TorchCommunicator:
        return TorchCommunicator(launch, "gloo", torch.device("cpu"))


comm = Gloo()


def worker_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """The host's interface, where one is named."""
    interface = settings.get("network_interface")
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def probe() -> tuple[bool, str, dict[str, str]]:
    """(available, reason, versions)."""
    return True, "torch runs on every host", {"torch": torch.__version__}
