"""Custom gradients in PyNative mode: the one module that touches MindSpore's private `_Function`.

The public `nn.Cell.bprop` needs static shapes and can't be recomputed selectively; `_Function` saves its tensors
where `mindspore.recompute` finds them. Its behaviour was read and tested in the versions named below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor

TESTED_VERSIONS = ("2.10",)

try:
    from mindspore.common._grad_function import _Function
except ImportError as error:
    raise ImportError(
        f"mindspore {ms.__version__} has no custom autograd function where twinmoe expects it; "
        f"install a tested version: {', '.join(TESTED_VERSIONS)}"
    ) from error

Forward = Callable[..., tuple[Tensor, Sequence[Tensor]]]
Backward = Callable[..., tuple[Any, ...]]


_differentiate: Any = ms.value_and_grad


def value_and_grad(fn: Callable[[], Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """fn() and its gradients with respect to the Parameters it closes over; zeros where it does not use one."""
    value, gradients = _differentiate(fn, None, weights=tuple(weights))()
    return value, gradients


def primitive(forward: Forward, backward: Backward) -> Callable[..., Tensor]:
    """A differentiable function of tensors and host values with a gradient of its own.

    forward(*inputs) -> (output, tensors to save). backward(gradient, saved, inputs, needs) -> one gradient (or
    None) per leading input: `inputs` repeats the host values (tensors are None there), `needs` says which
    inputs want a gradient. Tensors must travel through `saved`: recomputation replaces them.
    """

    class Op(_Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            output, saved = forward(*inputs)
            ctx.save_for_backward(*saved)
            ctx.host_inputs = tuple(None if isinstance(i, Tensor) else i for i in inputs)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            inputs = ctx.host_inputs
            found = backward(gradients[0], ctx.saved_tensors, inputs, ctx.needs_input_grad)
            return (*found, *[None] * (len(inputs) - len(found)))

    Op.__name__ = Op.__qualname__ = forward.__name__.lstrip("_")
    return Op.apply
