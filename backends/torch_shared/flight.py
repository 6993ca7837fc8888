"""An all-to-all in flight while other work is done, forward and backward.

Forward, `start` issues and `finish` waits. Backward, the gradient of `finish` issues and that of `start` waits: what
the engine computes between the two runs under the exchange. All calls are issued by the calling thread, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import direct
from .line import Line


@dataclass
class Flight:
    """One exchange and its adjoint. send, recv: rows by rank (None: equal); far: between nodes.

    held: what must live until the wait. gradient: that of x, on its way; the engine would not take it from `finish`,
    whose input has other rows.
    """

    line: Line
    send: list[int] | None = None
    recv: list[int] | None = None
    far: bool = False
    work: Sequence[Any] = ()
    held: Any = None
    gradient: Tensor | None = None

    def issue(self, x: Tensor) -> Tensor:
        """An all-to-all; the result is not there before `land`."""
        x = x.contiguous()
        y = x.new_empty((x.shape[0] if self.recv is None else sum(self.recv), *x.shape[1:]))
        with self.line.call("all_to_all, begun", x, self.send, self.recv):
            if self.far and dist.get_backend(self.line.handle) == "gloo":
                self.work = direct.post(x, y, self.send, self.recv, self.line.handle)
            else:
                handle = self.line.handle
                self.work = [dist.all_to_all_single(y, x, self.recv, self.send, group=handle, async_op=True)]
        self.held = x
        return y

    def land(self) -> None:
        """Wait; what is issued next is the adjoint."""
        with self.line.call("all_to_all, awaited", self.held, self.send, self.recv):
            for work in self.work:
                work.wait()
        self.line, self.send, self.recv = self.line.back(), self.recv, self.send
        self.work, self.held = (), None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        return flight.issue(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.flight.land()
        gradient, ctx.flight.gradient = ctx.flight.gradient, None
        return gradient, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.land()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.flight.gradient = ctx.flight.issue(grads[0])
        return grads[0], None


def start(x: Tensor, flight: Flight) -> tuple[Tensor, Flight]:
    """(the result to be, its flight)."""
    return _Start.apply(x, flight), flight  # type: ignore[return-value]


def finish(started: tuple[Tensor, Flight]) -> Tensor:
    """The result, once it has arrived."""
    return _Finish.apply(*started)  # type: ignore[no-any-return]
