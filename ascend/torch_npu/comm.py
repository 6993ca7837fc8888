"""`comm` of `ascend-torch`: torch.distributed over HCCL, and what HCCL lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...backends.launchers import device_index
from ...backends.protocol import Group, Launch
from ...backends.registry import told_variables
from ...backends.torch_shared.comm import TorchCommunicator
from .. import hccl


class NpuCommunicator(TorchCommunicator):
    """HCCL reduces no float64, and batched point-to-point takes one block per ordered pair of ranks and call."""

    def all_reduce(self, x: Tensor, group: Group) -> Tensor:
        """Float64, which only norms use, is gathered and summed in rank order."""
        if x.dtype != torch.float64 or group.size == 1:
            return super().all_reduce(x, group)
        return self.all_gather(x[None], group).sum(0)

    def reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        """ValueError for float64."""
        if x.dtype == torch.float64 and group.size > 1:
            raise ValueError("HCCL sums no float64; reduce in float32, or gather and sum on the host")
        return super().reduce_scatter(x, group)

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], group: Group
    ) -> list[Tensor]:
        """What goes to one peer in one dtype travels as one block; blocks without elements don't travel."""
        results: dict[int, Tensor] = {n: torch.empty_like(t) for n, (_, t) in enumerate(receives) if not t.numel()}
        for dtype in sorted({x.dtype for _, x in (*sends, *receives)}, key=str):
            leaving = _by_peer([(p, x.detach().reshape(-1)) for p, x in sends if x.dtype == dtype and x.numel()])
            coming: dict[int, list[int]] = {}
            for n, (peer, template) in enumerate(receives):
                if template.dtype == dtype and template.numel():
                    coming.setdefault(peer, []).append(n)
            blocks = super().exchange(
                [(peer, torch.cat(parts)) for peer, parts in leaving.items()],
                [(peer, torch.cat([receives[n][1].reshape(-1) for n in places])) for peer, places in coming.items()],
                group,
            )
            for places, block in zip(coming.values(), blocks, strict=True):
                pieces = block.split([receives[n][1].numel() for n in places])
                results |= {n: piece.view_as(receives[n][1]) for n, piece in zip(places, pieces, strict=True)}
        return [results[n] for n in range(len(receives))]

    def gather_to_host(self, x: Tensor | np.ndarray, group: Group) -> np.ndarray:
        """Float64 of the host travels as its bits, which no device computes with."""
        if not isinstance(x, np.ndarray) or x.dtype != np.float64:
            return super().gather_to_host(x, group)
        return super().gather_to_host(x.view(np.int64), group).view(np.float64)


def _by_peer(blocks: Sequence[tuple[int, Tensor]]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for peer, x in blocks:
        found.setdefault(peer, []).append(x)
    return found


def connect(launch: Launch) -> NpuCommunicator:
    """Take this rank's NPU and join the job, with a time limit that outlasts HCCL's own."""
    npu = torch.npu  # type: ignore[attr-defined]
    index = device_index(launch.local_rank, npu.device_count())
    npu.set_device(index)
    patient = replace(launch, timeout_s=hccl.patience_s(launch.timeout_s, told_variables("HCCL_")))
    return NpuCommunicator(patient, "hccl", torch.device("npu", index))
