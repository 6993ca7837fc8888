"""Home of the backend `cuda`: torch and Triton on NVIDIA GPUs, NCCL between processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..backends.torch_shared.trainer import TorchTrainer
from . import comm, ops

__all__ = ["comm", "device_count", "ops", "probe", "trainer", "worker_environment"]

trainer = TorchTrainer(torch.device("cuda"))


def device_count() -> int:
    """GPUs that processes of this host may use."""
    return torch.cuda.device_count()


LINKS: Mapping[str, Mapping[str, str]] = {
    "nvlink": {},
    "shared_memory": {"NCCL_P2P_DISABLE": "1"},
    "socket": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"},
}
"""What NCCL is told so that the cards of a host talk over a slower link: about 200 and 16 Gb/s, as between nodes."""


def worker_environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """The host's interface, where one is named, and the class of link between the cards of a host (`link`)."""
    interface = settings.get("network_interface")
    named = {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface} if interface else {}
    return {**LINKS[settings.get("link") or "nvlink"], **named}


def probe() -> tuple[bool, str, dict[str, str]]:
    """(available, reason, versions)."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    if not torch.cuda.is_available():
        return False, "torch finds no NVIDIA GPU", versions
    try:
        import triton
    except ImportError:
        return False, "triton is not installed; pip install 'twinmoe[cuda]'", versions
    return True, torch.cuda.get_device_name(0), {**versions, "triton": triton.__version__}
