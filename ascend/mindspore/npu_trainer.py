"""`trainer` of `ascend`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import mindspore as ms
from mindspore import Tensor

from ...backends.protocol import Communicator, Component, Group, TrainOptions
from . import trainer
from .npu_ops import check_dtype
from .trainer import (
    clip_gradients,
    evaluate,
    forget_gradients,
    gradients,
    load_tensors,
    module,
    state_rows,
    step,
    tensors,
    write_state_rows,
)

__all__ = [
    "accumulate",
    "build",
    "clip_gradients",
    "evaluate",
    "forget_gradients",
    "gradients",
    "load_tensors",
    "module",
    "peak_memory",
    "reduce_gradients",
    "state_rows",
    "step",
    "synchronize",
    "tensors",
    "write_state_rows",
]


def build(
    components: Sequence[Component], options: TrainOptions, groups: Mapping[str, Group], comm: Communicator
) -> trainer.MindSporeState:
    """Make the cells, draw the parameters, prepare the optimizer. ValueError for float64."""
    check_dtype(options.dtype)
    return trainer.build(components, options, groups, comm)


def accumulate(state: trainer.MindSporeState, loss_fn: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """As `trainer.accumulate`, and wait for its collectives under the heartbeat: backward has no other wait."""
    found = trainer.accumulate(state, loss_fn)
    _settle(state.comm, "forward and backward")
    return found


def reduce_gradients(state: trainer.MindSporeState) -> None:
    """As `trainer.reduce_gradients`, and wait for it under the heartbeat."""
    trainer.reduce_gradients(state)
    _settle(state.comm, "the sums of gradients")


def _settle(comm: Communicator, what: str) -> None:
    waiting = getattr(comm, "waiting", None)
    with nullcontext() if waiting is None else waiting(what):
        ms.runtime.synchronize()


def peak_memory(reset: bool = False) -> int:
    """Largest number of bytes allocated on the NPU since the last reset."""
    peak = int(ms.runtime.max_memory_allocated())
    if reset:
        ms.runtime.reset_peak_memory_stats()
    return peak


def synchronize() -> None:
    """Wait for the NPU."""
    ms.runtime.synchronize()
