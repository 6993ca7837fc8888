"""A component as `nn.Cell`: its parameters, registered, and its pure function as construct."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from mindspore import Parameter as Weight
from mindspore import Tensor, nn

from ...backends.protocol import Component, DType
from .ops import asarray, cast
from .sharding import Shards


def make_weight(name: str, value: np.ndarray, dtype: DType) -> Weight:
    """A stored tensor with its first values."""
    return Weight(cast(asarray(value), dtype), name=name)


class FunctionCell(nn.Cell):
    """Calls the component's forward with its parameters by name; `master` parameters in stored precision."""

    def __init__(
        self,
        component: Component,
        weights: Mapping[str, Weight],
        dtype: DType,
        shards: Mapping[str, Shards] | None = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self._forward = component.forward
        self._compute: DType = dtype
        self._masters = frozenset(p.name for p in component.parameters if p.master)
        self._shards = dict(shards or {})
        self.weights = {p.name: weights[p.name] for p in component.parameters}
        for name, weight in self.weights.items():
            self.insert_param_to_cell(name.replace(".", "__"), weight, check_name_contain_dot=False)

    def construct(self, *inputs: Any, **named: Any) -> Any:
        return self._forward({name: self._value(name) for name in self.weights}, *inputs, **named)

    def _value(self, name: str) -> Tensor:
        weight = self.weights[name]
        value = self._shards[name].whole(weight) if name in self._shards else weight
        return value if name in self._masters else cast(value, self._compute)
