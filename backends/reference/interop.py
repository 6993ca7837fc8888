"""Components as modules of the tape, alone or inside somebody else's loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..protocol import Communicator, Component, Group, Parameter, Piece
from .tape import Var, variable


@dataclass(frozen=True)
class Module:
    """A component and the leaves that it reads: callable as forward(leaves by name, *inputs)."""

    forward: Callable[..., Any]
    leaves: Mapping[str, Var]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.forward(self.leaves, *inputs, **named)


Model = Sequence["ReferenceLayerModule | Var"]
"""A model around layers, as the tape has none of its own: layers and single leaves in an order."""


class ReferenceLayerModule:
    """protocol.LayerModule on the tape, where gradients are arrays that the caller holds."""

    def __init__(self, component: Component, groups: Mapping[str, Group], comm: Communicator) -> None:
        self.leaves = {p.name: variable(p.initial()) for p in component.parameters}
        self._call = Module(component.forward, self.leaves)
        self._specs = {p.name: p for p in component.parameters}
        self._groups, self._comm = groups, comm

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self._call(*inputs, **named)

    def expert_parameters(self) -> list[Var]:
        return [self.leaves[p.name] for p in self._experts()]

    def sync_gradients(self, gradients: Sequence[np.ndarray] | None = None) -> tuple[np.ndarray, ...]:
        """gradients: of `expert_parameters`, in order. ValueError when they are left out: the tape stores none."""
        if gradients is None:
            raise ValueError("the reference keeps no gradients; pass those of expert_parameters() in their order")
        sums = [
            self._comm.all_reduce(Var(g), self._groups[p.reduce_over]).value
            for p, g in zip(self._experts(), gradients, strict=True)
        ]
        return tuple(g / self._comm.size for g in sums)

    def clip_grad_norm(
        self, model: Model, max_norm: float, gradients: Sequence[np.ndarray] | None = None
    ) -> tuple[tuple[np.ndarray, ...], float]:
        """(clipped gradients, norm); gradients: of the model's leaves, in their order. ValueError without them."""
        if gradients is None:
            raise ValueError("the reference keeps no gradients; pass those of the model's leaves in their order")
        leaves = _leaves(model)
        squares = {owner: 0.0 for _, owner in leaves}
        for (_, owner), g in zip(leaves, gradients, strict=True):
            squares[owner] += float((g * g).sum())
        total = squares.pop(None, 0.0)
        for owner in sorted(o for o in squares if o is not None):
            total += float(self._comm.all_reduce(Var(squares[owner]), self._groups[owner]).value)
        norm = math.sqrt(total)
        factor = max_norm / norm if norm > max_norm else 1.0
        return tuple(g * factor for g in gradients), norm

    def exclude_experts(self, model: Any) -> None:
        """Nothing to do: the tape has no data-parallel wrapper."""

    def layer_state_dict(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name, leaf in self.leaves.items():
            pieces = self._specs[name].pieces
            rows = zip(pieces, leaf.value, strict=True) if pieces else [(Piece(name, leaf.shape), leaf.value)]
            found.update({piece.name: np.array(row) for piece, row in rows})
        return found

    def owners(self) -> dict[Var, str | None]:
        """Group whose ranks hold the other parts, for each leaf that differs between ranks."""
        return {self.leaves[p.name]: p.norm_over for p in self._experts()}

    def _experts(self) -> list[Parameter]:
        return [p for p in self._specs.values() if p.norm_over is not None or p.reduce_over != "world"]


def _leaves(model: Model) -> list[tuple[Var, str | None]]:
    """(leaf, group whose ranks hold its other parts)."""
    found: list[tuple[Var, str | None]] = []
    for part in model:
        owners = part.owners() if isinstance(part, ReferenceLayerModule) else {}
        found += [(leaf, owners.get(leaf)) for leaf in ([part] if isinstance(part, Var) else part.leaves.values())]
    return found
