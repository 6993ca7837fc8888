"""Read by type checkers only: every backend's modules have the functions of the Protocols, with their types.

Trainers are missing on purpose: each takes the state that it made itself, which no Protocol can say;
tests/contract/test_signatures.py compares their parameters instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinmoe.ascend.mindspore import npu_ops
    from twinmoe.ascend.mindspore.comm import MindSporeCommunicator
    from twinmoe.backends import protocol
    from twinmoe.backends.reference import comm as reference_comm
    from twinmoe.backends.reference import ops as reference_ops
    from twinmoe.backends.torch_shared import ops as torch_ops
    from twinmoe.backends.torch_shared.comm import TorchCommunicator
    from twinmoe.moe_core.launch import Watcher
    from twinmoe.moe_core.progress import RunView

    ops: tuple[protocol.Ops, ...] = (reference_ops, torch_ops, npu_ops)
    homes: tuple[protocol.Comm, ...] = (reference_comm,)

    def communicates(
        reference: reference_comm.Communicator, torch: TorchCommunicator, mindspore: MindSporeCommunicator
    ) -> tuple[protocol.Communicator, ...]:
        return (reference, torch, mindspore)

    def watches(view: RunView) -> Watcher:
        return view
