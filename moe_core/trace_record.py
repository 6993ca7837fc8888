"""Recording during training: counts come from the plans that ranks have anyway, ids from one gather a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..backends.protocol import Communicator, Group, Ops
from .build import Runtime
from .combinations import ConfigError
from .config import Config
from .layer import LayerStats
from .plan import Plan
from .run_folder import model_hash
from .trace import SAMPLED, SUFFIX, Record, TraceInfo, TraceWriter

FOLDER = "trace"
"""Of a run folder."""


@dataclass
class TraceRecorder:
    """Writes every `every`-th step of an expert group; all its ranks call `add` and `end_step` alike.

    writer: of the rank that writes, the first of the group; None on the others.
    """

    ops: Ops
    comm: Communicator
    group: Group
    info: TraceInfo
    every: int = 1
    writer: TraceWriter | None = None
    _waiting: list[tuple[int, int, np.ndarray, np.ndarray]] = field(default_factory=list)
    _micro: int = 0

    def wants(self, step: int) -> bool:
        return step % self.every == 0

    def add(self, stats: Sequence[LayerStats]) -> None:
        """One micro-batch: what each layer chose. Copies ids of a sample of this rank's tokens to the host."""
        share, experts = -(-SAMPLED // self.group.size), self.info.num_experts
        for layer, s in enumerate(stats):
            ids = np.asarray(self.ops.to_numpy(s.ids_TK), np.int64)
            keep = np.linspace(0, len(ids), min(share, len(ids)), endpoint=False).astype(np.int64)
            counts = (
                np.bincount(ids[ids >= 0], minlength=experts)[None] if s.plan is None else counts_of(s.plan, experts)
            )
            self._waiting.append((layer, self._micro, counts, ids[keep]))
        self._micro += 1

    def end_step(self, step: int) -> None:
        """Gather the sampled ids and write. Collective over the expert group."""
        waiting, self._waiting, self._micro = self._waiting, [], 0
        if not waiting:
            return
        ids = np.concatenate([sample for *_, sample in waiting])
        sizes = [len(sample) for *_, sample in waiting]
        everyone = self.comm.gather_to_host(ids.reshape(-1), self.group).astype(np.int64)
        if self.writer is None:
            return
        by_rank = everyone.reshape(self.group.size, -1, self.info.top_k)
        ends = np.cumsum(sizes)
        records = []
        for (layer, micro, counts, _), end, size in zip(waiting, ends, sizes, strict=True):
            part = by_rank[:, end - size : end]
            source = np.repeat(np.arange(self.group.size), size)
            records.append(Record(step, layer, micro, counts, part.reshape(-1, self.info.top_k), source))
        self.writer.write(records)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def recorder_of(config: Config, runtime: Runtime, run_dir: Path) -> TraceRecorder | None:
    """What `train.trace_every` asks for; None for 0. ConfigError for layers of several heads."""
    if not config.train.trace_every:
        return None
    if config.moe.num_heads > 1:
        raise ConfigError("train.trace_every records layers of one head; set moe.num_heads=1 or trace_every=0")
    group, mesh = runtime.groups["expert"], runtime.mesh
    first = runtime.groups["expert"].ranks[0] // mesh.tensor
    info = TraceInfo(config.moe.num_experts, config.moe.top_k, group.size, first, "record", model_hash(config))
    leads = group.index == 0 and runtime.groups["tensor"].index == 0
    path = run_dir / FOLDER / f"ranks_{first:05d}{SUFFIX}"
    writer = TraceWriter(path, info) if leads else None
    return TraceRecorder(runtime.ops, runtime.comm, group, info, config.train.trace_every, writer)


def counts_of(plan: Plan, experts: int) -> np.ndarray:
    """(R, E) rows of each expert by source: what the plan was made from."""
    flat = plan.slots.reshape(-1)
    held = np.flatnonzero(flat >= 0)
    counts_ER = np.zeros((experts, plan.ranks), np.int64)
    np.add.at(counts_ER, flat[held], plan.flow[:, held].T)
    return counts_ER.T
