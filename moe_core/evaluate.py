"""`twinmoe eval`: the loss of a checkpoint by domain, forward only, under any scheme and on any number of ranks.

Sequences are taken up domain by domain, so that no batch mixes two; without capacity a token's loss does not depend
on its neighbours in the batch, and the sum over domains is what training calls the validation loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.protocol import Launch
from ..backends.registry import Backend
from .checkpoint import Checkpoint
from .combinations import ConfigError, check_ranks, check_trainable
from .config import Config
from .data import Data, GlobalBatch, Packed
from .init_from import checkpoint_folder, is_theirs
from .observe import StepTotals, gather_totals, load_record
from .run_folder import model_hash
from .topology import cluster_of_launch
from .train import SCALARS, Session

EVERYTHING = "everything"
"""Option `of`: all documents; otherwise those held out of training."""


def run_rank(backend: Backend, launch: Launch, options: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """One rank of the evaluation; the report is the same on every rank.

    options: config (whole, with model.init_from), of, batches (at most so many of global_batch_size sequences).
    """
    config = Config.model_validate(options["config"])
    check_ranks(config, launch.size)
    check_trainable(config)
    config = config.model_copy(update={"cluster": cluster_of_launch(launch, config.cluster)})
    comm = backend.comm.connect(launch)
    try:
        session = Session.open(config, backend, comm, run_dir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    session.step = _take_up(session, Path(config.model.init_from or ""))
    sequences = _held_out(session.data, options["batches"]) if options["of"] != EVERYTHING else None
    if sequences is None:
        sequences = _everything(session.data, options["batches"])
    report = Evaluation(session).report(sequences)
    comm.close()
    return report


def _take_up(session: Session, folder: Path) -> int:
    """What routers learned without gradients, which is no parameter; returns the steps that the checkpoint made."""
    if is_theirs(folder):
        return 0
    manifest = Checkpoint(checkpoint_folder(folder), (session.comm.rank, session.comm.size)).manifest
    session.router_states.restore(manifest.get("router_states", {}))
    return int(manifest["step"])


def _held_out(data: Data, batches: int | None) -> list[list[Packed]]:
    """Validation sequences by domain: each once, or those of the first batches, which a training run looks at."""
    if batches is None:
        return [list(data.held_out(domain)) for domain in range(len(data.corpus.domains))]
    found: list[list[Packed]] = [[] for _ in data.corpus.domains]
    for index in range(min(batches, data.validation_batches)):
        batch = data.validation_batch(index)
        for s, domain in enumerate(batch.domain_S):
            n = int(batch.real_SL[s].sum())
            row = (batch.tokens_SL[s, :n], batch.targets_SL[s, :n], batch.documents_SL[s, :n], int(domain))
            found[int(domain)].append(row)
    return found


def _everything(data: Data, batches: int | None) -> list[list[Packed]]:
    """All sequences by domain, or an even share of `batches` x global_batch_size from the start of each."""
    domains = len(data.corpus.domains)
    most = None if batches is None else -(-batches * data.global_batch_size // domains)
    found = []
    for domain in range(domains):
        whole = data.whole_domain(domain)
        found.append(list(whole) if most is None else [s for s, _ in zip(whole, range(most))])
    return found


class Evaluation:
    """Sums over batches on this rank."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.totals = StepTotals()
        self.seconds, self.tokens = 0.0, 0

    def report(self, by_domain: Sequence[Sequence[Packed]]) -> dict[str, Any]:
        """The JSON of `eval` without what was asked."""
        session = self.session
        losses, rows = np.zeros(len(by_domain)), []
        session.backend.trainer.peak_memory(reset=True)
        for domain, sequences in enumerate(by_domain):
            losses[domain] = sum(self._contribution(batch) for batch in self._batches(sequences))
        everyone = session.comm.gather_to_host(losses, session.runtime.groups["world"]).sum(0)
        everyone = everyone / session.runtime.mesh.tensor
        targets = [sum(len(s[1]) for s in sequences) for sequences in by_domain]
        for domain, (sequences, count) in enumerate(zip(by_domain, targets)):
            loss = float(everyone[domain]) / count if count else None
            name = session.data.corpus.domains[domain].name
            rows.append({"domain": name, "loss": loss, "targets": count, "sequences": len(sequences)})
        loss = float(everyone.sum()) / max(1, sum(targets))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "targets": sum(targets), "domains": rows} | (
            self._how()
        )

    def _batches(self, sequences: Sequence[Packed]) -> Iterator[GlobalBatch]:
        """Batches of global_batch_size sequences; the last is filled up with empty ones, so that ranks share it."""
        size, nothing = self.session.config.train.global_batch_size, np.zeros(0, np.int64)
        for first in range(0, len(sequences), size):
            taken = list(sequences[first : first + size])
            taken += [(nothing, nothing, nothing, taken[0][3])] * (size - len(taken))
            yield self.session.data.pack(taken)

    def _contribution(self, batch: GlobalBatch) -> float:
        """This rank's part of the summed loss of a batch, in nats."""
        session, start = self.session, time.perf_counter()
        ops, index = session.backend.ops, session.runtime.groups["expert"].index
        total = session.summed_loss(batch, lambda output: self.totals.add(ops, output, index))
        self.seconds, self.tokens = self.seconds + time.perf_counter() - start, self.tokens + batch.total_tokens
        return total

    def _how(self) -> dict[str, Any]:
        session, moe = self.session, self.session.config.moe
        shape = (len(session.model.moe_layers), moe.num_heads * moe.num_experts)
        names = (*SCALARS, *sorted(k for k in self.totals.scalars if k.startswith("bytes/")))
        summary = gather_totals(self.totals, session.comm, session.runtime.groups["world"], shape, names, False)
        return {
            "step": session.step,
            "model_hash": model_hash(session.config),
            "data_hash": session.data.hash,
            "backend": session.backend.name,
            "scheme": session.config.parallel.scheme,
            "world_size": session.comm.size,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "peak_memory_bytes": max(0, session.backend.trainer.peak_memory() - session.base_memory),
            **load_record(summary),
        }
