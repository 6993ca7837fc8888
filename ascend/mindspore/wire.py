"""What moves bytes, and the same with every collective in the log of what a rank was doing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from mindspore import Tensor

from ...backends.calls import CallLog
from ...backends.protocol import Group

Splits = list[int] | None
_BACKWARD = " (backward)"


class Wire(Protocol):
    """Collectives on tensors, without gradients, in groups of at least two ranks.

    One that logs its calls itself has the log as its attribute `calls`.
    """

    def open_group(self, name: str, partition: Sequence[Sequence[int]]) -> Any: ...
    def all_to_all(self, x: Tensor, group: Group, send: Splits, recv: Splits) -> Tensor: ...
    def all_gather(self, x: Tensor, group: Group) -> Tensor: ...
    def reduce_scatter(self, x: Tensor, group: Group) -> Tensor: ...
    def all_reduce(self, x: Tensor, group: Group) -> Tensor: ...
    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], group: Group
    ) -> list[Tensor]: ...
    def gather_to_host(self, x: Tensor | np.ndarray, group: Group) -> np.ndarray: ...
    def broadcast(self, x: Tensor, root: int, group: Group) -> Tensor: ...
    def barrier(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Logged:
    """A wire as one call uses it. place: part of the model that made the call."""

    wire: Wire
    log: CallLog
    place: str = ""

    def back(self) -> Logged:
        """The same for the adjoint, which runs when the forward pass has long moved on."""
        return self if self.place.endswith(_BACKWARD) else replace(self, place=self.place + _BACKWARD)

    def all_to_all(self, x: Tensor, group: Group, send: Splits, recv: Splits) -> Tensor:
        with self._call("all_to_all", group, (x.shape, send, recv)):
            return self.wire.all_to_all(x, group, send, recv)

    def all_gather(self, x: Tensor, group: Group) -> Tensor:
        with self._call("all_gather", group, (x.shape,)):
            return self.wire.all_gather(x, group)

    def reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        with self._call("reduce_scatter", group, (x.shape,)):
            return self.wire.reduce_scatter(x, group)

    def all_reduce(self, x: Tensor, group: Group) -> Tensor:
        with self._call("all_reduce", group, (x.shape,)):
            return self.wire.all_reduce(x, group)

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], group: Group
    ) -> list[Tensor]:
        with self._call("exchange", group, ([(peer, x.shape) for peer, x in sends],)):
            return self.wire.exchange(sends, receives, group)

    def gather_to_host(self, x: Tensor | np.ndarray, group: Group) -> np.ndarray:
        with self._call("gather_to_host", group, (x.shape,)):
            return self.wire.gather_to_host(x, group)

    def broadcast(self, x: Tensor, root: int, group: Group) -> Tensor:
        with self._call("broadcast", group, (x.shape,)):
            return self.wire.broadcast(x, root, group)

    def barrier(self) -> None:
        with self._call("barrier", None, ()):
            self.wire.barrier()

    def _call(self, name: str, group: Group | None, sizes: tuple[Any, ...]) -> AbstractContextManager[None]:
        if getattr(self.wire, "calls", None) is not self.log:
            return self.log.call(name, group, sizes, self.place)
        return self._at_place()

    @contextmanager
    def _at_place(self) -> Iterator[None]:
        """Where the wire logs by itself, it must only know who calls."""
        before, self.log.place = self.log.place, self.place
        try:
            yield
        finally:
            self.log.place = before
