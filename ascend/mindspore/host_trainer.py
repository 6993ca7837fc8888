"""`trainer` of `mindspore-cpu`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...backends.host_memory import peak_resident
from ...backends.protocol import Communicator, Component, Group, TrainOptions
from . import trainer
from .host_ops import check_dtype
from .host_optimizer import squares, update
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
    """Make the cells, draw the parameters, prepare the optimizer. ValueError for bfloat16."""
    check_dtype(options.dtype)
    return replace(trainer.build(components, options, groups, comm), update=update, squares=squares)


def peak_memory(reset: bool = False) -> int:
    """Largest resident set in bytes since the last reset."""
    return peak_resident(reset)


def synchronize() -> None:
    """Nothing to wait for: the host launches operators in the calling thread."""
