"""AdamW (Loshchilov and Hutter, algorithm 2) and SGD, one tensor at a time, in the tensor's own precision.

Not MindSpore's: `mint.optim.Adam` changes nothing on the host, `mint.optim.AdamW` has no host kernel, and
`experimental.optim.AdamW` keeps learning rate and bias corrections in float32 and a third moment nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspore import Parameter, Tensor

from ...backends.protocol import TrainOptions
from .framework import mint, ops
from .ops import number


@dataclass(frozen=True)
class Moments:
    """Running means of a parameter's gradient and of its square."""

    exp_avg: Parameter
    exp_avg_sq: Parameter

    @classmethod
    def zeros(cls, weight: Parameter) -> Moments:
        made = [Parameter(ops.zeros_like(weight), name=f"{kind}.{weight.name}") for kind in ("exp_avg", "exp_avg_sq")]
        return cls(*made)


@dataclass(frozen=True)
class Rate:
    """What one update of a parameter uses: learning rate, its weight decay, and updates so far (this one included)."""

    learning_rate: float
    weight_decay: float
    updates: int


def update(weight: Parameter, gradient: Tensor, moments: Moments | None, options: TrainOptions, rate: Rate) -> None:
    """Change a parameter in place; SGD where it has no moments."""

    def exact(value: float) -> Tensor | float:
        return number(value, weight)

    decayed = weight * exact(1 - rate.learning_rate * rate.weight_decay)
    if moments is None:
        ops.assign(weight, decayed - gradient * exact(rate.learning_rate))
        return
    b1, b2 = options.beta1, options.beta2
    first = moments.exp_avg * exact(b1) + gradient * exact(1 - b1)
    second = moments.exp_avg_sq * exact(b2) + gradient * gradient * exact(1 - b2)
    spread = mint.sqrt(second) * exact((1 - b2**rate.updates) ** -0.5) + exact(options.eps)
    ops.assign(moments.exp_avg, first)
    ops.assign(moments.exp_avg_sq, second)
    ops.assign(weight, decayed - first / spread * exact(rate.learning_rate / (1 - b1**rate.updates)))
