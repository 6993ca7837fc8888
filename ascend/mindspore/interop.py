"""An MoE layer inside somebody else's MindSpore network, trained with MindSpore's own optimizers.

There gradients are tuples in the order of parameters, and nothing keeps a data-parallel reducer from averaging
experts: reduce the gradients of `expert_parameters` with `sync_gradients` instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from mindspore import Parameter as Weight
from mindspore import Tensor, nn

from ...backends.protocol import Communicator, Component, Group, Piece
from .cell import FunctionCell, make_weight
from .ops import number, to_numpy

Gradients = Sequence[Tensor]


class LayerCell(FunctionCell):
    """protocol.LayerModule: a component that knows which of its parameters belong to this rank alone."""

    def __init__(self, component: Component, groups: Mapping[str, Group], comm: Communicator) -> None:
        weights = {p.name: make_weight(p.name, p.initial(), "float32") for p in component.parameters}
        super().__init__(component, weights, "float32")
        self._specs = {p.name: p for p in component.parameters}
        self._groups, self._comm = groups, comm

    def expert_parameters(self) -> list[Weight]:
        """Parameters that differ between ranks, in the order in which `sync_gradients` takes their gradients (those
        of frozen ones, requires_grad False, are left out)."""
        return [self.weights[name] for name in self._experts()]

    def owners(self) -> dict[int, str | None]:
        """Group whose ranks hold the other parts, by id of each parameter that differs between ranks."""
        return {id(self.weights[name]): self._specs[name].norm_over for name in self._experts()}

    def _experts(self) -> list[str]:
        return [n for n, p in self._specs.items() if p.norm_over is not None or p.reduce_over != "world"]

    def sync_gradients(self, gradients: Gradients | None = None) -> tuple[Tensor, ...]:
        """Gradients of `expert_parameters` in their order -> those of the mean over ranks. ValueError without them."""
        if gradients is None:
            raise ValueError("MindSpore keeps no gradients; pass those of expert_parameters() in their order")
        learning = [name for name in self._experts() if self.weights[name].requires_grad]
        return tuple(
            self._comm.all_reduce(g, self._groups[self._specs[name].reduce_over]) / self._comm.size
            for name, g in zip(learning, gradients, strict=True)
        )

    def clip_grad_norm(
        self, model: nn.Cell, max_norm: float, gradients: Gradients | None = None
    ) -> tuple[tuple[Tensor, ...], float]:
        """(clipped gradients, norm); gradients: of `model.trainable_params()`, in their order. ValueError without."""
        if gradients is None:
            raise ValueError("MindSpore keeps no gradients; pass those of model.trainable_params() in their order")
        owners = {
            key: owner
            for _, cell in model.cells_and_names()
            if isinstance(cell, LayerCell)
            for key, owner in cell.owners().items()
        }
        squares: dict[str | None, float] = dict.fromkeys((None, *owners.values()), 0.0)
        for parameter, g in zip(model.trainable_params(), gradients, strict=True):
            squares[owners.get(id(parameter))] += float((to_numpy(g).astype(np.float64) ** 2).sum())
        total = squares.pop(None)
        for owner in sorted(o for o in squares if o is not None):
            total += float(self._comm.gather_to_host(np.array([squares[owner]]), self._groups[owner]).sum())
        norm = math.sqrt(total)
        factor = max_norm / norm if norm > max_norm else 1.0
        return tuple(g * number(factor, g) for g in gradients), norm

    def exclude_experts(self, model: nn.Cell) -> None:
        """Nothing to mark: give MindSpore's reducer only the gradients of the other parameters."""

    def layer_state_dict(self) -> dict[str, np.ndarray]:
        """This rank's parameters by logical name (experts by their id)."""
        found: dict[str, np.ndarray] = {}
        for name, value in self.weights.items():
            array = to_numpy(value)
            pieces = self._specs[name].pieces
            rows = zip(pieces, array, strict=True) if pieces else [(Piece(name, array.shape), array)]
            found.update({piece.name: np.array(row) for piece, row in rows})
        return found
