"""`trainer` of `ascend`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mindspore as ms

from ...backends.protocol import Communicator, Component, Group, TrainOptions
from . import trainer
from .npu_ops import check_dtype
from .trainer import (
    accumulate,
    clip_gradients,
    evaluate,
    forget_gradients,
    gradients,
    load_tensors,
    module,
    reduce_gradients,
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


def peak_memory(reset: bool = False) -> int:
    """Largest number of bytes allocated on the NPU since the last reset."""
    peak = int(ms.runtime.max_memory_allocated())
    if reset:
        ms.runtime.reset_peak_memory_stats()
    return peak


def synchronize() -> None:
    """Wait for the NPU."""
    ms.runtime.synchronize()
