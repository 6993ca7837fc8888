"""`parallel.data_assignment` in a training loop: which sequences of a global batch live on which node.

The expert histogram of a token id is kept by node, not by expert: all that an assignment asks is how many rows stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...backends.protocol import Array, Communicator, Group, Ops
from ..assignment import AffinityTable, Homes, assign
from ..data import GlobalBatch
from .locality import TOKEN_NODES


class Arrangement:
    """Reorders each global batch; under by_affinity it learns from the routing of past steps.

    nodes: virtual nodes (`moe.locality_nodes`) that share a batch in equal runs; ranks then take contiguous shares, so
    the order does not depend on their number.
    """

    def __init__(self, mode: str, nodes: int, vocab_size: int) -> None:
        everyone = np.arange(nodes)
        self._mode, self._homes = mode, Homes(everyone, everyone)
        self._table = AffinityTable(vocab_size, nodes) if mode == "by_affinity" and nodes > 1 else None
        self._counts_VR = np.zeros((vocab_size, nodes), np.int64)

    def arrange(self, batch: GlobalBatch) -> GlobalBatch:
        """The batch in its new order, positions counted anew: they are the homes. ValueError if nodes do not divide."""
        ordered = assign(self._mode, batch, self._homes, self._table)
        return replace(ordered, positions_S=np.arange(ordered.sequences))

    def observe(self, ops: Ops, statistics: Sequence[Mapping[str, Array]]) -> None:
        """Add the statistics of a micro-batch's layers."""
        if self._table is not None:
            for layer in statistics:
                self._counts_VR += ops.to_numpy(layer[TOKEN_NODES]).reshape(self._counts_VR.shape)

    def update(self, comm: Communicator, world: Group, copies: int = 1) -> None:
        """After an optimizer step: one gather, then the table. Collective. copies: ranks that hold the same tokens."""
        if self._table is not None:
            self._table.update(comm.gather_to_host(self._counts_VR, world).sum(0) // copies)
            self._counts_VR[...] = 0

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps ({} unless by_affinity)."""
        return {} if self._table is None else self._table.state()

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take a checkpoint's arrays back."""
        if self._table is not None:
            self._table.load(state)
