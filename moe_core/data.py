"""Token batches: a pure function of content, seed and step, whatever the number of ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from .config import DataConfig, TrainConfig
from .data_megatron import read_megatron
from .data_memmap import read_memmap
from .data_packing import Pool, Stream, split
from .data_sources import Corpus, read_corpus

_TRAIN, _VALIDATION, _SPLIT = 1, 2, 3
Packed = tuple[np.ndarray, np.ndarray, np.ndarray, int]
"""One sequence: tokens, targets, document numbers (as `Stream.sequence` gives them) and its domain."""


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """Sequences of one optimizer step, or a share of them. S sequences of L positions.

    tokens_SL, targets_SL int64 (target -1: ignored); real_SL bool (False: padding); documents_SL int64:
    document number inside the sequence (padding has a number of its own), where attention may not cross;
    positions_S, domain_S int64: index in the global batch, and domain. total_targets and total_tokens count
    the whole step, in every share of it: what a local loss is divided by.
    """

    tokens_SL: np.ndarray
    targets_SL: np.ndarray
    real_SL: np.ndarray
    documents_SL: np.ndarray
    positions_S: np.ndarray
    domain_S: np.ndarray
    total_targets: int
    total_tokens: int

    @property
    def sequences(self) -> int:
        return len(self.positions_S)

    def take(self, index_N: np.ndarray | slice) -> GlobalBatch:
        """The sequences `index`, in that order; totals stay those of the step."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("total_")}
        return replace(self, **{name: value[index_N] for name, value in arrays.items()})

    def for_rank(self, rank: int, ranks: int) -> GlobalBatch:
        """An equal, contiguous share. ValueError unless `ranks` divides the number of sequences."""
        if self.sequences % ranks:
            raise ValueError(
                f"train.global_batch_size={self.sequences} sequences cannot be shared equally by {ranks} ranks; "
                f"set it to a multiple of {ranks}, or use fewer ranks"
            )
        share = self.sequences // ranks
        return self.take(slice(rank * share, (rank + 1) * share))

    def micro_batches(self, size: int | None) -> list[GlobalBatch]:
        """Parts of `size` sequences (None: all at once). ValueError unless `size` divides the share."""
        size = size or self.sequences
        if self.sequences % size:
            raise ValueError(
                f"train.micro_batch_size={size} does not divide the {self.sequences} sequences of a rank; "
                f"choose a divisor of {self.sequences}"
            )
        return [self.take(slice(first, first + size)) for first in range(0, self.sequences, size)]


class Data:
    """A corpus, split and packed. Holds no position: `batch(step)` is all there is to resuming."""

    def __init__(self, corpus: Corpus, config: DataConfig, train: TrainConfig) -> None:
        self.corpus = corpus
        self.vocab_size = corpus.vocab_size
        self.sequence_length = train.sequence_length
        self.global_batch_size = train.global_batch_size
        self.hash = content_hash(corpus, config)
        self._masks = config.document_masks
        pieces = [split(d, config.validation_fraction, (config.seed, _SPLIT, i)) for i, d in enumerate(corpus.domains)]
        streams = [
            [Stream(d.tokens, *pieces[i][part], i, train.sequence_length) for i, d in enumerate(corpus.domains)]
            for part in (0, 1)
        ]
        key = (config.seed, train.seed)
        self._train = _pools(streams[0], config.domain_mix, (*key, _TRAIN))
        self._validation = _pools(streams[1], config.domain_mix, (config.seed, _VALIDATION))

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of an optimizer step (from 0): every rank can make all of it."""
        return self._batch(self._train, step)

    def validation_batch(self, index: int) -> GlobalBatch:
        """Held-out sequences, the same for every train.seed; past `validation_batches` they come again."""
        return self._batch(self._validation, index)

    @property
    def validation_batches(self) -> int:
        """How many batches it takes to see every validation sequence."""
        most = max(p.sequences for p in self._validation) * len(self._validation)
        return -(-most // self.global_batch_size)

    @property
    def sequences_per_epoch(self) -> int:
        """Training sequences, each of which comes once before any of its pool comes again."""
        return sum(p.sequences for p in self._train)

    @property
    def domain_shares(self) -> tuple[float, ...]:
        """Share of each domain in the training positions that batches are made of."""
        return tuple(s.positions / p.positions / len(self._train) for p in self._train for s in p.streams)

    def training_pairs(self, domain: int, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, targets) of a domain in pieces; of more than `limit` positions, about so many, evenly spread."""
        stream = [s for p in self._train for s in p.streams][domain]
        for first, last in _spread(stream.positions, limit):
            yield stream.read(first, last)[:2]

    def _batch(self, pools: tuple[Pool, ...], step: int) -> GlobalBatch:
        found = []
        for s in range(self.global_batch_size):
            turn, pool = divmod(step * self.global_batch_size + s, len(pools))
            stream, index = pools[pool].at(turn)
            found.append((*stream.sequence(index), stream.domain))
        return pack(found, self.sequence_length, self._masks)

    def whole_domain(self, domain: int) -> Iterator[Packed]:
        """Every sequence of a domain in its own order, training and validation documents alike."""
        whole = self.corpus.domains[domain]
        yield from _all_of(Stream(whole.tokens, whole.starts[:-1], np.diff(whole.starts), domain, self.sequence_length))

    def held_out(self, domain: int) -> Iterator[Packed]:
        """Every validation sequence of a domain once, in the order of its text."""
        yield from _all_of(next(s for p in self._validation for s in p.streams if s.domain == domain))

    def pack(self, sequences: Sequence[Packed]) -> GlobalBatch:
        """Sequences as one batch, whose totals are theirs."""
        return pack(sequences, self.sequence_length, self._masks)


def _all_of(stream: Stream) -> Iterator[Packed]:
    for index in range(stream.sequences):
        yield (*stream.sequence(index), stream.domain)


def pack(sequences: Sequence[Packed], length: int, masks: bool) -> GlobalBatch:
    """Sequences of at most `length` positions, padded to it. masks: attention stays inside a document."""
    S, L = len(sequences), length
    tokens, documents, domain = np.zeros((S, L), np.int64), np.zeros((S, L), np.int64), np.zeros(S, np.int64)
    targets, real = np.full((S, L), -1, np.int64), np.zeros((S, L), bool)
    for s, (x, y, d, from_domain) in enumerate(sequences):
        n = len(x)
        tokens[s, :n], targets[s, :n], real[s, :n], domain[s] = x, y, True, from_domain
        if masks:
            documents[s, :n], documents[s, n:] = d, d[-1] + 1 if n else 0
    totals = int((targets >= 0).sum()), int(real.sum())
    return GlobalBatch(tokens, targets, real, documents, np.arange(S), domain, *totals)


def open_data(data: DataConfig, train: TrainConfig, spool: Path | None = None) -> Data:
    """Read, split and pack what `data` describes. ValueError (missing or empty files, ...) says what to do.

    spool: a folder for tokens that are made here, instead of memory.
    """
    mapped = {"memmap": read_memmap, "megatron": read_megatron}.get(data.source)
    return Data(read_corpus(data, spool) if mapped is None else mapped(data), data, train)


def content_hash(corpus: Corpus, config: DataConfig) -> str:
    """SHA-256 (hex) of tokens, document boundaries and the rule that splits off validation."""
    digests = corpus.digests or tuple(d.digest() for d in corpus.domains)
    rule = [corpus.boundary, corpus.vocab_size, config.validation_fraction, config.seed, config.domain_mix]
    return hashlib.sha256(json.dumps([digests, rule]).encode()).hexdigest()


def _pools(streams: list[Stream], mix: str, key: tuple[int, ...]) -> tuple[Pool, ...]:
    """even: every domain has its turn and its own epochs; proportional: one epoch over all sequences."""
    groups = [tuple(streams)] if mix == "proportional" else [(s,) for s in streams]
    return tuple(Pool(group, (*key, i)) for i, group in enumerate(groups))


def _spread(positions: int, quota: int, run: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """Ranges of 0..positions, together about `quota` long and evenly spaced when that is less than all."""
    stride = max(1.0, positions / quota)
    if stride > 1.0:
        run = min(run, max(1, quota // 16))
    for first in range(0, positions, int(run * stride)):
        yield first, min(first + run, positions)
