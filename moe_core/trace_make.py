"""Traces that no run of ours wrote: choices of a stated skew, Megatron's routing trace, plain arrays."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .combinations import ConfigError
from .synthetic import Skew, check_size, choose
from .trace import SAMPLED, Record, Trace, TraceInfo, TraceWriter


@dataclass(frozen=True)
class Synthetic:
    """What to make up. tokens: per rank; drift: by how many ids hot experts move on each step; shift_at: the step from
    which experts trade places at random, as when the data's domain changes; layers differ by their permutation."""

    skew: Skew
    num_experts: int
    top_k: int
    ranks: int
    tokens: int = 4096
    layers: int = 1
    steps: int = 1
    drift: int = 0
    shift_at: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """ConfigError for choices that can't be made, or not at once in a host's memory."""
        self.skew.check(self.num_experts, self.top_k)
        check_size(self.tokens, self.num_experts)
        if self.seed < 0:
            raise ConfigError(f"the seed {self.seed} is below 0; choose 0 or above")

    @property
    def info(self) -> TraceInfo:
        return TraceInfo(self.num_experts, self.top_k, self.ranks, 0, f"synth {self.skew.text}")

    def records(self) -> Iterator[Record]:
        """Step by step. Counts are exact; where a group has more tokens than the sample, ids are every n-th."""
        for step in range(self.steps):
            for layer in range(self.layers):
                yield self.record(step, layer)

    def record(self, step: int, layer: int) -> Record:
        names = self._names(step, layer)
        share, counts, ids = -(-SAMPLED // self.ranks), [], []
        for rank in range(self.ranks):
            seed = ((self.seed * 1009 + step) * 1009 + layer) * 100_003 + rank
            chosen = names[choose(self.skew, self.num_experts, self.tokens, self.top_k, seed)]
            counts.append(np.bincount(chosen.reshape(-1), minlength=self.num_experts))
            ids.append(_sample(chosen, share))
        source = np.repeat(np.arange(self.ranks), [len(i) for i in ids])
        return Record(step, layer, 0, np.stack(counts), np.concatenate(ids), source)

    def _names(self, step: int, layer: int) -> np.ndarray:
        """Which expert stands for the n-th of the skew: the same in layer 0, permuted in others."""
        names = np.arange(self.num_experts)
        if layer:
            names = np.random.default_rng(self.seed + layer).permutation(names)
        names = (names + self.drift * step) % self.num_experts
        if self.shift_at is not None and step >= self.shift_at:
            names = np.random.default_rng(self.seed - 1 - layer + 2**31).permutation(self.num_experts)[names]
        return names


def _sample(ids_TK: np.ndarray, most: int) -> np.ndarray:
    """At most so many tokens, evenly spread."""
    keep = np.linspace(0, len(ids_TK), min(most, len(ids_TK)), endpoint=False).astype(np.int64)
    return ids_TK[keep]


def record_trace(synthetic: Synthetic) -> Trace:
    """Made-up choices, without a file."""
    return Trace(synthetic.info, {(r.step, r.layer, r.micro): r for r in synthetic.records()})


def write(path: Path, info: TraceInfo, records: Iterable[Record]) -> int:
    """A new trace file; returns the number of records. ConfigError where the file exists. A failure leaves none."""
    if path.exists():
        raise ConfigError(f"{path} exists; name another file")
    count = 0
    try:
        with TraceWriter(path, info) as writer:
            for record in records:
                writer.write([record])
                count += 1
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return count


# --- from others -------------------------------------------------------------------------------
def import_megatron(files: Sequence[Path], num_experts: int) -> tuple[TraceInfo, list[Record]]:
    """Megatron-Core's routing trace (`--moe-routing-trace-path`): a JSON line per step and layer, a file per rank.

    Decoder layers count, in their order; blocks of multi-token prediction are left out. Several lines of one step,
    layer and rank are its micro-batches. Ids past the sample count but are not kept. ConfigError for other files.
    """
    found: dict[tuple[int, int], dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                _megatron_line(line, f"{file} line {number}", num_experts, found)
    if not found:
        raise ConfigError(f"{files[0]} holds no decoder layer; is it a routing trace of Megatron?")
    rank_of = {r: i for i, r in enumerate(sorted({r for ranks in found.values() for r in ranks}))}
    layer_of = {layer: i for i, layer in enumerate(sorted({layer for _, layer in found}))}
    records, top_k = [], 0
    for (step, layer), by_rank in sorted(found.items()):
        for micro in range(max(len(parts) for parts in by_rank.values())):
            ids = {rank_of[r]: parts[micro] for r, parts in by_rank.items() if micro < len(parts)}
            top_k = next(iter(ids.values())).shape[1]
            records.append(record_of(step, layer_of[layer], micro, ids, (len(rank_of), num_experts)))
    return TraceInfo(num_experts, top_k, len(rank_of), 0, "Megatron routing trace"), records


def _megatron_line(
    line: str, place: str, num_experts: int, found: dict[tuple[int, int], dict[int, list[np.ndarray]]]
) -> None:
    try:
        entry = json.loads(line)
        if entry.get("block", "decoder") != "decoder" or "mtp_idx" in entry:
            return
        ids = np.array(entry["top_indices"], np.int64).reshape(entry["num_tokens"], -1)
        key, rank = (int(entry["step"]), int(entry["layer"])), int(entry["rank"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{place} is no record of Megatron's routing trace ({error!r})") from None
    check_ids(ids, num_experts, place)
    found[key][rank].append(ids)


def import_array(path: Path, num_experts: int | None = None) -> tuple[TraceInfo, list[Record]]:
    """A .npy file of ids (steps, layers, ranks, tokens, K), of which any leading axes may be missing.

    ConfigError for another file or dtype.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read as a NumPy array ({error})") from None
    if array.dtype.kind not in "iu" or not 2 <= array.ndim <= 5:
        raise ConfigError(
            f"{path} holds {array.dtype} {array.shape}; give integer ids (steps, layers, ranks, tokens, K)"
        )
    ids = array.reshape((1,) * (5 - array.ndim) + array.shape).astype(np.int64)
    experts = num_experts or int(ids.max(initial=0)) + 1
    check_ids(ids, experts, str(path))
    steps, layers, ranks, _, top_k = ids.shape
    records = [
        record_of(step, layer, 0, dict(enumerate(ids[step, layer])), (ranks, experts))
        for step in range(steps)
        for layer in range(layers)
    ]
    return TraceInfo(experts, top_k, ranks, 0, "array"), records


def check_ids(ids: np.ndarray, num_experts: int, place: str) -> None:
    if ids.size and (ids.max() >= num_experts or ids.min() < -1):
        wrong = int(ids.max()) if ids.max() >= num_experts else int(ids.min())
        raise ConfigError(f"{place} names expert {wrong} of {num_experts}; give the right number with --experts")


def record_of(step: int, layer: int, micro: int, ids: dict[int, np.ndarray], shape: tuple[int, int]) -> Record:
    """From whole id sets by rank. shape: ranks, experts."""
    counts = np.zeros(shape, np.int64)
    share = -(-SAMPLED // shape[0])
    samples = []
    for rank, chosen in sorted(ids.items()):
        counts[rank] = np.bincount(chosen[chosen >= 0], minlength=shape[1])
        samples.append((rank, _sample(chosen, share)))
    source = np.concatenate([np.full(len(s), rank) for rank, s in samples])
    return Record(step, layer, micro, counts, np.concatenate([s for _, s in samples]), source)
