"""A group as one call uses it: its handle, and where in the model the call was made, for the log."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..calls import CallLog
from ..protocol import Group

_BACKWARD = " (backward)"


@dataclass(frozen=True)
class Line:
    """place: part of the model that made the call."""

    log: CallLog
    group: Group
    place: str

    @property
    def handle(self) -> Any:
        return self.group.handle

    def back(self) -> Line:
        """The same for the adjoint, which runs when the forward pass has long moved on."""
        return self if self.place.endswith(_BACKWARD) else replace(self, place=self.place + _BACKWARD)

    def call(
        self, name: str, x: Tensor, send: list[int] | None = None, recv: list[int] | None = None
    ) -> AbstractContextManager[None]:
        """Around one collective of x."""
        return self.log.call(name, self.group, (tuple(x.shape), send, recv), self.place)
