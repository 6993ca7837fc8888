"""The training loop: batch, forward and backward, reduce, clip, step, record. The same lines on every backend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.protocol import Array, Communicator, Launch, Parameter, State, TrainOptions
from ..backends.registry import Backend
from .bigram import bigram_loss
from .build import Runtime, make_runtime
from .checkpoint import CHECKPOINTS, candidates
from .combinations import ConfigError, check_ranks, check_trainable, mesh_of
from .config import Config
from .data import Data, GlobalBatch, open_data
from .faults import NotSavedError, StepGuard, at_place, errors_explained, stalls_reported, terminations_noted
from .health import Health, gradient_norms, load_figures
from .init_from import open_source, started_from
from .metrics import MetricsWriter
from .model import Model, StepOutput, build_model
from .observe import StepSummary, StepTotals, gather_totals, load_record
from .placement import PlacedLayer, placed_layers, placed_parameters
from .plain_ops import plain_ops
from .resume import Resumed, manifest_of, restore, state_of
from .router_states import RouterStates
from .routing.arrangement import Arrangement, arrangement_of
from .routing.finite import NonFiniteWatch
from .run_folder import LOGS, model_hash
from .saving import Saver
from .shared_folder import check_shared
from .swapping import Swapper, swapper_of
from .topology import cluster_of_launch, node_of_ranks
from .trace_record import TraceRecorder, recorder_of
from .trackers import open_trackers

LOSSES = ("loss/load_balance", "loss/z", "loss/locality", "loss/entropy")
SCALARS = (
    "cross_entropy",
    *LOSSES,
    "rows/sent",
    "rows/computed",
    "rows/local",
    "between_nodes",
    "nan_tokens",
    "bad_norms",
)


def run(config: Config, backend: Backend, launch: Launch, run_dir: Path, resume: str | None = None) -> dict[str, Any]:
    """Train `config` as one rank of the job; returns the summary (the same on every rank)."""
    check_ranks(config, launch.size)
    check_trainable(config)
    config = config.model_copy(update={"cluster": cluster_of_launch(launch, config.cluster)})
    comm = backend.comm.connect(launch)
    with stalls_reported(comm, run_dir / LOGS, launch.timeout_s):
        saved = candidates(run_dir, resume)
        try:
            session = Session.open(config, backend, comm, run_dir, fresh=not saved)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        session.resumed = restore(session, saved)
        with terminations_noted(session.ask_to_stop):
            summary = session.train()
            comm.close()  # not after a failure: others would not come to its barrier
    return summary


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine from learning_rate to min_learning_rate at the last step."""
    train = config.train
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    floor = min(train.min_learning_rate, train.learning_rate)
    return floor + 0.5 * (train.learning_rate - floor) * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class Phases:
    """Wall-clock seconds by name."""

    trainer: Any
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.trainer.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass
class Session:
    """Everything one rank holds while training."""

    config: Config
    backend: Backend
    comm: Communicator
    runtime: Runtime
    model: Model
    state: State
    router_states: RouterStates
    arrangement: Arrangement
    watch: NonFiniteWatch
    data: Data
    run_dir: Path
    base_memory: int
    saver: Saver
    guard: StepGuard
    health: Health
    step: int = 0
    losses: list[float] = field(default_factory=list)
    asked_to_stop: bool = False
    stopping: bool = False
    swapper: Swapper | None = None
    recorder: TraceRecorder | None = None
    resumed: Resumed | None = None
    modules: dict[str, Any] = field(init=False)
    warnings: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        settle = self.backend.trainer.synchronize if self.config.train.synchronous else None
        self.modules = {name: at_place(self.comm, name, module, settle) for name, module in self.state.modules.items()}

    @classmethod
    def open(cls, config: Config, backend: Backend, comm: Communicator, run_dir: Path, fresh: bool = True) -> Session:
        """Data, mesh, model and optimizer of this rank. fresh: first values come from where the config says."""
        data = open_data(config.data, config.train)
        ops = plain_ops(backend.ops) if config.train.plain_ops else backend.ops
        runtime = make_runtime(ops, comm, mesh_of(config, comm.size), config.parallel, config.cluster)
        check_shared(comm, runtime.groups["world"], run_dir)
        data.batch(0).for_rank(0, runtime.mesh.token_ranks)
        if data.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size={config.model.vocab_size} is too small for the data, whose tokens go up to "
                f"{data.vocab_size - 1}; set it to at least {data.vocab_size}"
            )
        model = build_model(config, runtime)
        components = model.components
        if fresh and config.model.init_from is not None:
            source = open_source(Path(config.model.init_from), config, (comm.rank, comm.size))
            components = started_from(components, source)
        train = config.train
        options = TrainOptions(
            dtype=train.dtype,
            beta1=train.adam_beta1,
            beta2=train.adam_beta2,
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
            data_sharding=config.parallel.data_sharding,
        )
        state = backend.trainer.build(components, options, runtime.groups, comm)
        base = backend.trainer.peak_memory(reset=True)
        swapper = swapper_of(config, runtime, model)
        routers = RouterStates(model.routers)
        arrangement = arrangement_of(config, runtime.mesh.token_ranks)
        arrangement.arrange(data.batch(0))
        watch = NonFiniteWatch(config.moe.nan_policy, comm.rank, model.moe_layers, train.sequence_length)
        saver = Saver(run_dir / CHECKPOINTS, comm, runtime.groups["world"], train.keep_last, train.save_async)
        guard = StepGuard(train.on_nan, train.explode_factor)
        health = Health(model.moe_layers, train.health_every)
        own = (routers, arrangement, watch, data, run_dir, base, saver, guard, health)
        recorder = recorder_of(config, runtime, run_dir)
        return cls(config, backend, comm, runtime, model, state, *own, swapper=swapper, recorder=recorder)

    # --- the loop ----------------------------------------------------------------------------
    def train(self) -> dict[str, Any]:
        """Steps until train.steps, a save request or SIGTERM (which saves and ends in order)."""
        train = self.config.train
        writer = self._writer() if self.comm.rank == 0 else None
        started, tokens = time.perf_counter(), 0
        try:
            while self.step < train.steps and not self.stopping:
                record = self.train_step()
                tokens += int(record["tokens"])
                if train.validate_every and self.step % train.validate_every == 0 and self.step < train.steps:
                    record["validation_loss"] = self.validation_loss()
                if self.stopping or self.step % train.log_every == 0 or self.step == train.steps:
                    record["warnings"] = self._new_warnings()
                    if writer is not None:
                        writer.write(self.step, record)
                if self.stopping or self._wants_save():
                    self.save()
            self.saver.finish()
            if writer is not None and writer.lost:
                self.warnings.append(f"{writer.lost} records of metrics.jsonl were NOT written: the disk is full")
            if self.stopping and self.saver.written != self.step:
                raise NotSavedError(*self.saver.warnings[-1:])
            seconds = time.perf_counter() - started
            return self._summary(tokens / max(seconds, 1e-9))
        finally:
            if writer is not None:
                writer.close()

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its record."""
        config, trainer = self.config, self.backend.trainer
        start, phases = time.perf_counter(), Phases(self.backend.trainer)
        with phases("data"):
            batch = self.arrangement.arrange(self.data.batch(self.step))
            mine = batch.for_rank(self._token_rank, self.runtime.mesh.token_ranks)
        totals = StepTotals(node_of_ranks(config.cluster, self.runtime.groups["expert"].ranks))
        micros = mine.micro_batches(config.train.micro_batch_size)
        rows = micros[0].tokens_SL.size * config.moe.top_k * config.moe.num_heads
        with phases("forward_backward"), errors_explained(self.comm, self.step + 1, rows):
            for micro in micros:
                _, output = trainer.accumulate(self.state, lambda m=micro: self._loss(m))
                totals.add(self.backend.ops, output, self.runtime.groups["expert"].index)
                self.router_states.add(self.backend.ops, output.stats)
                self.arrangement.observe(self.backend.ops, [s.statistics for s in output.stats])
                totals.scalars["nan_tokens"] += self.watch.add(self.backend.ops, output.stats)
                if self.swapper is not None and self.swapper.wants(self.step):
                    self.swapper.observe(output.stats)
                if self.recorder is not None and self.recorder.wants(self.step):
                    self.recorder.add(output.stats)
        with phases("reduce"):
            trainer.reduce_gradients(self.state)
            parts = self._gradient_norms() if self.health.wants_norms(self.step) else {}
            norm = trainer.clip_gradients(self.state, config.train.max_grad_norm)
        totals.scalars["bad_norms"] = float(not math.isfinite(norm))
        totals.scalars.update(self.saver.status())
        summary = self._gather(totals)
        self.saver.settle(summary.scalars)
        rate = learning_rate(config, self.step)
        with phases("optimizer"):
            self._update(summary, norm, rate)
        swapped: list[Any] = []
        if self.swapper is not None:
            with phases("swap"):
                swapped = self.swapper.after_step(trainer, self.state)
        if self.recorder is not None:
            with phases("trace"):
                self.recorder.end_step(self.step)
        self.stopping = summary.flags > 0
        self.step += 1
        record = self._record(summary, norm, rate, batch.total_tokens, time.perf_counter() - start, phases.seconds)
        record |= {"grad_norms": parts} if parts else {}
        record |= {} if self.swapper is None else {"swaps": sum(swap is not None for swap in swapped)}
        self.warnings += self.health.warnings(record, summary.chosen_LE)
        return record

    def _gradient_norms(self) -> dict[str, float]:
        found = self.backend.trainer.gradients(self.state)
        return gradient_norms(found, self.model.parameters, self.runtime.groups, self.comm)

    def _update(self, summary: StepSummary, norm: float, rate: float) -> None:
        """The optimizer's step and what is learned without gradients, unless the step is a bad one (`train.on_nan`)."""
        found = summary.scalars["nan_tokens"]
        self.watch.judge(0 if self.guard.policy == "skip" else found)
        loss = summary.scalars["cross_entropy"] / self.runtime.mesh.tensor
        learning = (self.router_states, self.arrangement)
        if self.guard.accepts(self.step + 1, loss, norm, summary.scalars["bad_norms"] + found):
            self.backend.trainer.step(self.state, rate)
            for learns in learning:
                learns.update(self.comm, self.runtime.groups["world"], self.runtime.mesh.tensor)
            return
        self.backend.trainer.forget_gradients(self.state)
        for learns in learning:
            learns.forget()
        self.warnings.append(f"step {self.step + 1} was skipped ({self.guard.skipped} in this run): loss {loss:g}")

    def _loss(self, batch: GlobalBatch, training: bool = True) -> tuple[Array, StepOutput]:
        return self.model.loss(self.modules, batch, self.step, training, self.router_states.states)

    def _gather(self, totals: StepTotals) -> StepSummary:
        moe = self.config.moe
        shape = (len(self.model.moe_layers), moe.num_heads * moe.num_experts)
        names = (*SCALARS, *sorted(k for k in totals.scalars if k.startswith(("bytes/", "plan/", "save/"))))
        return gather_totals(totals, self.comm, self.runtime.groups["world"], shape, names, self.asked_to_stop)

    def _record(
        self, summary: StepSummary, norm: float, rate: float, tokens: int, seconds: float, phases: dict[str, float]
    ) -> dict[str, Any]:
        scale = 1.0 / self.config.parallel.tensor_parallel_size  # tensor ranks hold the same tokens
        loss = summary.scalars["cross_entropy"] * scale
        auxiliary = {n[5:]: v * scale for n, v in summary.scalars.items() if n.startswith("loss/")}
        self.losses.append(loss)
        weighted = sum(self.model.coefficients.get(n, 0.0) * v for n, v in auxiliary.items())
        return {
            "step": self.step,
            "loss": loss,
            "objective": loss + weighted,
            "auxiliary": auxiliary,
            "learning_rate": rate,
            "grad_norm": norm,
            "skipped_steps": self.guard.skipped,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "phases": phases,
            "peak_memory_bytes": self._peak_memory(),
            **load_record(summary),
            **load_figures(summary.chosen_LE),
        }

    def validation_loss(self) -> float:
        """Cross-entropy per token over the validation batches, forward only."""
        batches = [self.data.validation_batch(index) for index in range(self._validation_batches)]
        total = sum(self.summed_loss(batch) for batch in batches)
        weight = sum(batch.total_targets for batch in batches)
        everyone = self.comm.gather_to_host(np.array([total]), self.runtime.groups["world"]).sum()
        return float(everyone) / max(1, weight) / self.config.parallel.tensor_parallel_size

    def summed_loss(self, batch: GlobalBatch, seen: Callable[[StepOutput], None] = lambda _: None) -> float:
        """This rank's part of the summed cross-entropy of a batch, forward only; `seen` gets every micro-batch."""
        total = 0.0
        mine = batch.for_rank(self._token_rank, self.runtime.mesh.token_ranks)
        for micro in mine.micro_batches(self.config.train.micro_batch_size):
            output = self.backend.trainer.evaluate(self.state, lambda m=micro: self._loss(m, training=False)[1])
            total += float(self.backend.ops.to_numpy(output.cross_entropy)) * batch.total_targets
            seen(output)
        return total

    def _summary(self, tokens_per_second: float) -> dict[str, Any]:
        validation = self.validation_loss()
        batches = [self.data.validation_batch(i) for i in range(self._validation_batches)]
        losses = [loss if math.isfinite(loss) else None for loss in self.losses]  # JSON has no NaN
        bigram = bigram_loss(self.data, batches) if self.comm.rank == 0 else float("nan")
        return {
            "steps": self.step,
            "losses": losses,
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "validation_loss": validation,
            "bigram_loss": bigram,
            "tokens_per_second": tokens_per_second,
            "world_size": self.comm.size,
            "backend": self.backend.name,
            "scheme": self.config.parallel.scheme,
            "peak_memory_bytes": self._peak_memory(),
            "data_hash": self.data.hash,
            "model_hash": model_hash(self.config),
            "run_dir": str(self.run_dir),
            "stopped_early": self.step < self.config.train.steps,
            "skipped_steps": self.guard.skipped,
            "resumed": None if self.resumed is None else self.resumed.as_json(),
            "late_warnings": self._new_warnings(),
            "warnings": self.told,
        }

    # --- checkpoints -------------------------------------------------------------------------
    def _wants_save(self) -> bool:
        train = self.config.train
        return train.save_every > 0 and (self.step % train.save_every == 0 or self.step == train.steps)

    def save(self) -> Path | None:
        """Write a checkpoint of this step (all ranks call it); older ones are pruned. None: not written, or not yet."""
        if self.resumed is not None and self.resumed.step == self.step:
            return self.resumed.folder
        contents = (self.backend.trainer.tensors(self.state), state_of(self))
        return self.saver.save(self.step, manifest_of(self), self.parameters, self.runtime.groups, contents)

    # --- small things ------------------------------------------------------------------------
    def _writer(self) -> MetricsWriter:
        about = self.config.model_dump(mode="json")
        return MetricsWriter(self.run_dir, self.step, open_trackers(self.config.train.trackers, self.run_dir, about))

    @property
    def placed(self) -> list[PlacedLayer]:
        return placed_layers(self.model.layers, self.model.parameters) if self.swapper is not None else []

    @property
    def parameters(self) -> dict[str, Parameter]:
        """This rank's parameters, named by the experts that rest in them now."""
        return placed_parameters(self.model.parameters, self.placed, self.runtime.groups["expert"].index)

    @property
    def updates(self) -> int:
        """Steps that the optimizer made: all but those that were skipped."""
        return self.step - self.guard.skipped

    def _new_warnings(self) -> list[str]:
        new = [*self.saver.warnings, *self.warnings]
        self.told += new
        self.saver.warnings.clear()
        self.warnings.clear()
        return new

    @property
    def _token_rank(self) -> int:
        return self.comm.rank // self.runtime.mesh.tensor

    @property
    def _validation_batches(self) -> int:
        return min(self.config.train.validation_batches, self.data.validation_batches)

    def _peak_memory(self) -> int:
        return max(0, self.backend.trainer.peak_memory() - self.base_memory)

    def ask_to_stop(self, *_: object) -> None:
        """SIGTERM's handler: this rank would like to save and end."""
        self.asked_to_stop = True  # `stopping` follows on all ranks at once, from a step's gather
