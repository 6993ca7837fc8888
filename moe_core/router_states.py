"""What routers learn without gradients, while a model trains: held, updated once per optimizer step, saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..backends.protocol import Communicator, Group, Ops
from .checkpoint import CheckpointError
from .layer import LayerStats
from .routing.base import Router, State


class RouterStates:
    """States by layer, the same on every rank, and the statistics of the step that is under way."""

    def __init__(self, routers: Mapping[int, Router]) -> None:
        self._routers = {layer: router for layer, router in routers.items() if router.initial_state()}
        self._layers = sorted(routers)
        self.states: dict[int, State] = {i: router.initial_state() for i, router in self._routers.items()}
        self._totals: dict[int, dict[str, np.ndarray]] = {}

    def add(self, ops: Ops, stats: Sequence[LayerStats]) -> None:
        """Add a micro-batch's statistics; stats: of all MoE layers in order. Copies to the host where one learns."""
        for layer, seen in zip(self._layers, stats, strict=True):
            if layer in self._routers:
                totals = self._totals.setdefault(layer, {})
                for name, value in seen.statistics.items():
                    totals[name] = totals.get(name, 0) + ops.to_numpy(value)

    def update(self, comm: Communicator, world: Group, copies: int = 1) -> None:
        """After the optimizer's step: one gather of all statistics, then every router's update. Collective.

        copies: ranks that hold the same tokens (tensor parallelism), which count once.
        """
        if not self._totals:
            return
        parts = [(layer, name, v) for layer, named in sorted(self._totals.items()) for name, v in sorted(named.items())]
        flat = np.concatenate([np.asarray(v, np.int64).reshape(-1) for _, _, v in parts])
        sums = comm.gather_to_host(flat, world).sum(0) // copies
        totals: dict[int, dict[str, np.ndarray]] = {}
        for (layer, name, value), total in zip(
            parts, np.split(sums, np.cumsum([np.size(v) for _, _, v in parts])[:-1])
        ):
            totals.setdefault(layer, {})[name] = total.reshape(np.shape(value))
        self.states = {i: router.update_state(self.states[i], totals[i]) for i, router in self._routers.items()}
        self._totals = {}

    def forget(self) -> None:
        """Drop a step's statistics: it was skipped."""
        self._totals = {}

    def as_json(self) -> dict[str, dict[str, Any]]:
        """For a manifest: exact, as Python prints floats."""
        return {str(i): {name: np.asarray(v).tolist() for name, v in state.items()} for i, state in self.states.items()}

    def restore(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """States of a manifest; CheckpointError where a layer's is missing or of another shape."""
        for layer, state in self.states.items():
            found = {name: np.asarray(v, np.float64) for name, v in saved.get(str(layer), {}).items()}
            if {n: np.shape(v) for n, v in found.items()} != {n: np.shape(v) for n, v in state.items()}:
                raise CheckpointError(
                    f"the saved router state of layer {layer} is not this model's; resume with the config of the save"
                )
            self.states[layer] = found
