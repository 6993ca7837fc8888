"""From a trace to the choices of a job: of the ranks that recorded it, or of another number of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .combinations import ConfigError
from .config import Config
from .mesh import Mesh
from .simulate import Choices, Source, tokens_per_micro_batch
from .trace import Record, Trace
from .trace_make import Synthetic


def source_of(trace: Trace, config: Config, mesh: Mesh) -> Source:
    """Choices of every layer of `config` on a mesh. Layer n takes layer n (modulo their number) of the trace.

    Where ranks or tokens differ from the recorded ones, rank r takes the choices of recorded rank r modulo their
    number, scaled to its tokens: expert groups that a recorded job fits into are then alike. ConfigError where the
    layer is another one.
    """
    info, moe = trace.info, config.moe
    if (info.num_experts, info.top_k) != (moe.num_experts, moe.top_k):
        raise ConfigError(
            f"the trace is of {info.num_experts} experts, {info.top_k} a token; the config has moe.num_experts="
            f"{moe.num_experts}, moe.top_k={moe.top_k}"
        )
    tokens = tokens_per_micro_batch(config, mesh)
    layers = trace.layers

    def source(layer: int) -> Sequence[Sequence[Choices]]:
        recorded = layers[layer % len(layers)]
        micros = [trace.micros(step, recorded) for step in trace.steps]
        return [[on_ranks(record, mesh.token_ranks, tokens) for record in step] for step in micros if step]

    return source


def alike(trace: Trace, layers: int) -> tuple[tuple[int, int], ...]:
    """(layer, how many of the model's layers take the same choices), for a model of so many MoE layers."""
    recorded = min(len(trace.layers), layers)
    return tuple((n, len(range(n, layers, len(trace.layers)))) for n in range(recorded))


def synthetic_source(synthetic: Synthetic) -> Source:
    """Choices that are made up when they are asked for, layer by layer."""

    def source(layer: int) -> Sequence[Sequence[Choices]]:
        records = [synthetic.record(step, layer) for step in range(synthetic.steps)]
        return [[Choices(r.counts_RE, r.ids_SK, r.source_S)] for r in records]

    return source


def on_ranks(record: Record, ranks: int, tokens: int) -> Choices:
    """The recorded choices for `ranks` ranks of `tokens` tokens each; themselves where these are the recorded ones."""
    recorded, top_k = len(record.counts_RE), record.ids_SK.shape[1]
    wanted = tokens * top_k
    sums = record.counts_RE.sum(1)
    if recorded == ranks and (sums == wanted).all():
        return Choices(record.counts_RE, record.ids_SK, record.source_S)
    scaled = np.stack([scaled_to(row, wanted) for row in record.counts_RE])
    return Choices(scaled[np.arange(ranks) % recorded], record.ids_SK, record.source_S % ranks)


def scaled_to(row_E: np.ndarray, total: int) -> np.ndarray:
    """Integers of this sum in the proportions of `row_E`: largest remainders, ties to the lower id."""
    share = int(row_E.sum())
    if share == 0:
        return row_E
    exact = row_E.astype(np.int64) * total
    whole, rest = exact // share, exact % share
    extra = np.argsort(-rest, kind="stable")[: total - int(whole.sum())]
    whole[extra] += 1
    return whole
