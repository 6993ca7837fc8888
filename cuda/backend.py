"""Home of the backend `cuda`: torch and Triton on NVIDIA GPUs, NCCL between processes."""

from __future__ import annotations

import torch

from ..backends.torch_shared.trainer import TorchTrainer
from . import comm, ops

__all__ = ["comm", "device_count", "ops", "probe", "trainer"]

trainer = TorchTrainer(torch.device("cuda"))


def device_count() -> int:
    """GPUs that processes of this host may use."""
    return torch.cuda.device_count()


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
