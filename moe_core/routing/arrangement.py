"""`parallel.data_assignment` in a training loop: which sequences of a global batch live on which node.

The expert histogram of a token id is kept by node, not by expert: all that an assignment asks is how many rows stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...backends.protocol import Array, Communicator, Group, Ops
from ..assignment import AffinityTable, Homes, assign
from ..config import Config
from ..data import GlobalBatch
from .locality import TOKEN_NODES


def arrangement_of(config: Config, token_ranks: int) -> Arrangement:
    """What `parallel.data_assignment` asks for. ValueError where by_affinity has no nodes to learn about.

    With virtual nodes a batch is shared among them, and ranks take contiguous shares: the order does not depend on the
    number of ranks. Without, by_domain shares it among ranks, and round_robin leaves it as it was drawn.
    """
    mode, nodes = config.parallel.data_assignment, config.moe.locality_nodes
    if mode == "by_affinity" and nodes == 1:
        raise ValueError(
            "parallel.data_assignment=by_affinity needs nodes that experts and sequences live on; "
            "set moe.locality_nodes to 2 or more"
        )
    return Arrangement(mode, nodes if nodes > 1 else token_ranks, config.model.vocab_size, virtual=nodes > 1)


class Arrangement:
    """Reorders each global batch; under by_affinity it learns from the routing of past steps.

    nodes share a batch in equal runs. virtual: they are `moe.locality_nodes`, and places in the new order are homes.
    """

    def __init__(self, mode: str, nodes: int, vocab_size: int, virtual: bool = True) -> None:
        everyone = np.arange(nodes)
        self._mode, self._homes, self._virtual = mode, Homes(everyone, everyone), virtual
        self._table = AffinityTable(vocab_size, nodes) if mode == "by_affinity" and nodes > 1 else None
        self._counts_VR = np.zeros((vocab_size, nodes), np.int64)

    def arrange(self, batch: GlobalBatch) -> GlobalBatch:
        """The batch in its new order, positions anew if nodes are virtual. ValueError unless nodes divide the batch."""
        if self._mode == "round_robin" and not self._virtual:
            return batch
        ordered = assign(self._mode, batch, self._homes, self._table)
        # ranks must not show in positions: random numbers are keyed by them
        return replace(ordered, positions_S=np.arange(ordered.sequences)) if self._virtual else ordered

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

    def forget(self) -> None:
        """Drop what a step showed: it was skipped."""
        self._counts_VR[...] = 0

    def as_json(self) -> dict[str, Any]:
        """What a manifest keeps: integers ({} unless by_affinity)."""
        return {} if self._table is None else {name: value.tolist() for name, value in self._table.state().items()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take a manifest's table back; where there is none (another assignment was saved), start without."""
        if self._table is not None and saved:
            self._table.load({name: np.asarray(value, np.int64) for name, value in saved.items()})
