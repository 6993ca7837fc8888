"""An all-to-all in flight while other work is done, forward and backward.

Forward, `start` issues and `finish` waits. Backward, the gradient of `finish` issues and that of `start` waits: what
the engine computes between the two runs under the exchange. All calls are issued by the calling thread, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .line import Line


@dataclass
class Flight:
    """One exchange and its adjoint. `held`: what must live until the wait."""

    line: Line
    work: Any = None
    held: Any = None

    def issue(self, x: Tensor) -> Tensor:
        """An all-to-all of equal splits; the result is not there before `land`."""
        x = x.contiguous()
        y = torch.empty_like(x)
        with self.line.call("all_to_all, begun", x):
            self.work, self.held = dist.all_to_all_single(y, x, group=self.line.handle, async_op=True), x
        return y

    def land(self) -> None:
        with self.line.call("all_to_all, awaited", self.held):
            self.work.wait()
        self.line = self.line.back()
        self.work = self.held = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.issue(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.flight.land()
        return grads[0], None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.land()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.issue(grads[0]), None


def start(x: Tensor, line: Line) -> tuple[Tensor, Flight]:
    """(the result to be, its flight)."""
    flight = Flight(line)
    return _Start.apply(x, flight), flight  # type: ignore[return-value]


def finish(started: tuple[Tensor, Flight]) -> Tensor:
    """The result, once it has arrived."""
    return _Finish.apply(*started)  # type: ignore[no-any-return]
