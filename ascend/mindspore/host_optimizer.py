"""The updates of `optimizer` in NumPy: thirteen small MindSpore operators a tensor cost the host more than the sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, Tensor

from ...backends.protocol import TrainOptions
from .framework import ops
from .optimizer import Moments, Rate


def update(weight: Parameter, gradient: Tensor, moments: Moments | None, options: TrainOptions, rate: Rate) -> None:
    """Change a parameter in place; SGD where it has no moments."""
    g = gradient.asnumpy()
    new = weight.asnumpy() * g.dtype.type(1 - rate.learning_rate * rate.weight_decay)
    if moments is None:
        new -= g * g.dtype.type(rate.learning_rate)
    else:
        new -= _direction(g, moments, options, rate)
    ops.assign(weight, Tensor.from_numpy(new))


def squares(gradients: Sequence[Tensor]) -> float:
    """Sum of all squares: per tensor in its own dtype, over tensors in float64."""
    flat = [g.asnumpy().ravel() for g in gradients]
    return float(sum(float(np.dot(g, g)) for g in flat))


def _direction(g: np.ndarray, moments: Moments, options: TrainOptions, rate: Rate) -> np.ndarray:
    """learning rate * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), after updating both moments."""
    number = g.dtype.type
    first = moments.exp_avg.asnumpy() * number(options.beta1)
    first += g * number(1 - options.beta1)
    second = moments.exp_avg_sq.asnumpy() * number(options.beta2)
    spread = g * g
    spread *= number(1 - options.beta2)
    second += spread
    np.sqrt(second, out=spread)
    spread *= number((1 - options.beta2**rate.updates) ** -0.5)
    spread += number(options.eps)
    ops.assign(moments.exp_avg, Tensor.from_numpy(first))
    ops.assign(moments.exp_avg_sq, Tensor.from_numpy(second))
    np.divide(first, spread, out=spread)
    spread *= number(rate.learning_rate / (1 - options.beta1**rate.updates))
    return spread
