"""Two MoE layers in training with weights fetched ahead and without: bits, and the order of collectives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Communicator, Launch, TrainOptions
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.data import GlobalBatch
from twinmoe.moe_core.layer import MoELayer
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.model import Model, build_model
from twinmoe.moe_core.planners.budget import RowBudgetError

STEPS, SEQUENCES, LENGTH, VOCABULARY = 4, 4, 6, 17
LAER: Mapping[str, Any] = {
    "planner": "relayout",
    "residency": "fully_sharded",
    "slots_per_rank": 4,
    "relayout": {"window": 2, "hysteresis": 0, "skip_below": 0},
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "laer": LAER,
    "fsdp_ep": {"residency": "fully_sharded"},
    "in rounds": {**LAER, "max_rows_per_rank": 14},
    "overlap": {**LAER, "overlap_chunks": 2},
}


def config_of(parallel: Mapping[str, Any], ahead: int, dtype: str = "float64") -> Config:
    shape = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_layers": 4, "num_attention_heads": 2}
    return Config.model_validate(
        {
            "model": {**shape, "num_dense_layers": 1, "init_std": 0.3},
            "moe": {"num_experts": 8, "top_k": 2, "expert_hidden_size": 5, "num_shared_experts": 1},
            "parallel": {**parallel, "prefetch_layers": ahead},
            "train": {"dtype": dtype, "global_batch_size": 4 * SEQUENCES},
        }
    )


def batch_of(rank: int, ranks: int, step: int) -> GlobalBatch:
    """A few of the vocabulary's words, others at each step: experts are drawn unevenly and layouts change."""
    rng = np.random.default_rng([rank, step])
    words = rng.integers(0, 5, (SEQUENCES, LENGTH + 1)) + 3 * step
    places, total = np.arange(SEQUENCES) + rank * SEQUENCES, ranks * SEQUENCES * LENGTH
    real, one = np.ones((SEQUENCES, LENGTH), bool), np.zeros((SEQUENCES, LENGTH), np.int64)
    return GlobalBatch(words[:, :-1], words[:, 1:], real, one, places, np.zeros(SEQUENCES, np.int64), total, total)


@dataclass
class Seen:
    """Of one rank: every number in order, its collectives as (name, group, place), layouts that changed."""

    numbers: list[tuple[str, np.ndarray]] = field(default_factory=list)
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    changed: int = 0


def train(backend: Any, comm: Communicator, config: Config) -> Seen:
    """Steps of two micro-batches, an evaluation between them, and one step that is left out."""
    runtime = make_runtime(backend.ops, comm, Mesh.over(comm.size, comm.size), config.parallel)
    model = build_model(config, runtime)
    options = TrainOptions(dtype=config.train.dtype)
    state = backend.trainer.build(model.components, options, runtime.groups, comm)
    seen = Seen(calls=recorded(comm))
    for step in range(STEPS):
        _step(backend, model, state, batch_of(comm.rank, comm.size, step), (step, seen))
    seen.numbers += [(f"{kind} {name}", value.copy()) for name, kind, value in backend.trainer.tensors(state)]
    unrecorded(comm)
    return seen


def _step(backend: Any, model: Model, state: Any, batch: GlobalBatch, where: tuple[int, Seen]) -> None:
    (step, seen), trainer = where, backend.trainer
    for micro in batch.micro_batches(SEQUENCES // 2):
        loss, out = trainer.accumulate(state, lambda micro=micro: model.loss(state.modules, micro, step))
        seen.numbers.append((f"loss {step}", backend.ops.to_numpy(loss)))
        seen.changed += sum(int(stats.figures.get("layouts_changed", 0)) for stats in out.stats)
    _, out = trainer.evaluate(state, lambda: model.loss(state.modules, batch, step, training=False))
    seen.numbers.append((f"evaluation {step}", backend.ops.to_numpy(out.cross_entropy)))
    trainer.reduce_gradients(state)
    seen.numbers += [(f"gradient {step} {name}", value.copy()) for name, value in trainer.gradients(state).items()]
    if step == 1:
        trainer.forget_gradients(state)
        return
    trainer.clip_gradients(state, 1.0)
    trainer.step(state, 0.01)


def recorded(comm: Any) -> list[tuple[str, str, str]]:
    """A list to which the communicator's log adds every collective from now on."""
    calls: list[tuple[str, str, str]] = []
    log = getattr(comm, "calls", None)
    if log is None:
        return calls
    inner = log.call

    def call(name: str, group: Any, sizes: Any = (), place: str | None = None) -> Any:
        calls.append((name, "all ranks" if group is None else group.name, log.place if place is None else place))
        return inner(name, group, sizes, place)

    log.call = call
    return calls


def unrecorded(comm: Any) -> None:
    vars(getattr(comm, "calls", comm)).pop("call", None)


def differing(one: Seen, other: Seen) -> list[str]:
    """Names of numbers that are not the same bits."""
    assert [name for name, _ in one.numbers] == [name for name, _ in other.numbers]
    pairs = zip(one.numbers, other.numbers, strict=True)
    return [name for (name, a), (_, b) in pairs if np.asarray(a).tobytes() != np.asarray(b).tobytes()]


def process(backend: Backend, launch: Launch, ways: list[str], dtype: str, fault: bool = False) -> dict[str, Any]:
    """By way: what differs on any rank, whether calls are the same on all, and rank 0's calls with prefetch.

    fault: with prefetch nobody waits for the exchange of a gradient, which is lost.
    """
    comm = backend.comm.connect(launch)
    world = comm.group("world", [list(range(comm.size))])
    found: dict[str, Any] = {}
    for way in ways:
        plain = train(backend, comm, config_of(WAYS[way], 0, dtype))
        if fault:
            _lose_gradients()
        ahead = train(backend, comm, config_of(WAYS[way], 1, dtype))
        differs = differing(plain, ahead)
        worst = comm.gather_to_host(np.array([len(differs), ahead.changed]), world)
        order = np.frombuffer(hashlib.sha256(repr(ahead.calls).encode()).digest(), np.uint8)
        alike = bool((comm.gather_to_host(order, world) == order).all())
        found[way] = {
            "differs": differs,
            "worst": int(worst[:, 0].max()),
            "alike": alike,
            "changed": int(ahead.changed),
            "plain": plain.calls,
            "ahead": ahead.calls,
        }
    comm.close()
    return found


def _lose_gradients() -> None:
    from twinmoe.backends.torch_shared import flight

    start: Any = flight._Start
    start.backward = staticmethod(lambda ctx, *grads: (None, None))


def process_over_budget(backend: Backend, launch: Launch) -> dict[str, Any]:
    """A plan over its budget in a layer whose weights are under way; the same communicator goes on afterwards."""
    comm = backend.comm.connect(launch)
    plain = train(backend, comm, config_of(LAER, 0))
    strict = config_of(LAER, 1)
    runtime = make_runtime(backend.ops, comm, Mesh.over(comm.size, comm.size), strict.parallel)
    model = build_model(strict, runtime)
    third = model.layers[2]
    assert isinstance(third, MoELayer)
    object.__setattr__(third, "rounds", replace(third.rounds, max_rows=1, over="error"))
    state = backend.trainer.build(model.components, TrainOptions(dtype="float64"), runtime.groups, comm)
    calls, raised = recorded(comm), False
    try:
        model.loss(state.modules, batch_of(comm.rank, comm.size, 0))
    except RowBudgetError:
        raised = True
    unrecorded(comm)
    names = [name for name, _, _ in calls]
    again = train(backend, comm, config_of(LAER, 1))
    result = {"raised": raised, "names": names, "differs": differing(plain, again)}
    comm.close()
    return result
