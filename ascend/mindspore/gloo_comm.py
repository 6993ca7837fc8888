"""`comm` of `mindspore-cpu`: torch's gloo in the same process carries MindSpore's arrays. Never imported on an NPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mindspore import Tensor

from ...backends.protocol import Group, Launch
from ...backends.torch_shared.comm import TorchCommunicator
from .comm import MindSporeCommunicator, Splits


def connect(launch: Launch) -> MindSporeCommunicator:
    """Join the job that `launch` describes."""
    return MindSporeCommunicator(launch.rank, launch.size, GlooWire(launch))


class GlooWire:
    """comm.Wire through torch.distributed; both frameworks look at the same host memory."""

    def __init__(self, launch: Launch) -> None:
        self._torch = TorchCommunicator(launch, "gloo", torch.device("cpu"))
        self.calls = self._torch.calls

    def open_group(self, name: str, partition: Sequence[Sequence[int]]) -> Any:
        return self._torch.group(name, partition).handle

    def all_to_all(self, x: Tensor, group: Group, send: Splits, recv: Splits) -> Tensor:
        return _back(self._torch.all_to_all(_lend(x), group, send, recv), x)

    def all_gather(self, x: Tensor, group: Group) -> Tensor:
        return _back(self._torch.all_gather(_lend(x), group), x)

    def reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        return _back(self._torch.reduce_scatter(_lend(x), group), x)

    def all_reduce(self, x: Tensor, group: Group) -> Tensor:
        return _back(self._torch.all_reduce(_lend(x), group), x)

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], group: Group
    ) -> list[Tensor]:
        results = self._torch.exchange(
            [(peer, _lend(x)) for peer, x in sends], [(peer, _lend(x)) for peer, x in receives], group
        )
        return [_back(y, template) for y, (_, template) in zip(results, receives, strict=True)]

    def gather_to_host(self, x: Tensor | np.ndarray, group: Group) -> np.ndarray:
        value = x.asnumpy() if isinstance(x, Tensor) else np.asarray(x)
        return self._torch.gather_to_host(value, group).reshape(group.size, *value.shape)

    def broadcast(self, x: Tensor, root: int, group: Group) -> Tensor:
        return _back(self._torch.broadcast(_lend(x), root, group), x)

    def barrier(self) -> None:
        self._torch.barrier()

    def close(self) -> None:
        self._torch.close()


def _lend(x: Tensor) -> torch.Tensor:
    """The same memory as a torch tensor; booleans as bytes, which gloo can move."""
    value = np.asarray(x.asnumpy(), order="C")
    return torch.from_numpy(value.view(np.uint8) if value.dtype == np.bool_ else value)


def _back(y: torch.Tensor, like: Tensor) -> Tensor:
    value = y.numpy()
    return Tensor.from_numpy(value.view(np.bool_) if like.asnumpy().dtype == np.bool_ else value)
