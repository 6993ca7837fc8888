"""One layer under one layout against the dense oracle: outputs, every gradient, losses, norm, optimizer steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..backends.protocol import Communicator, Component, DType, Group, Parameter, Piece, TrainOptions
from .bits import digest_of
from .build import LayerParts, LayerSpec, Runtime, build_layer, make_runtime
from .config import MoeConfig, ParallelConfig
from .layer import MoEOutput
from .mesh import Mesh
from .parameters import take_part
from .placement import PlacedLayer, exchange_rows, exchanged, move_of, placed_parameters, rank_of_expert
from .routing.base import Memo, Tokens, times
from .transformer import scoped

WIDTH = 12
LENGTH = 4
LEARNING_RATE = 0.05
MAX_NORM = 0.5
FLOOR = 1e-3
"""Error of a tensor = ||a - b|| / max(||b||, FLOOR x the largest gradient norm of the case)."""

ROUTINGS = ("random", "same_experts", "ties", "idle_rank", "uneven", "padding_tail", "padding_only")
ORACLE_ROUTERS = ("topk", "switch")


@dataclass(frozen=True)
class Case:
    """A layer, how it runs, and what its tokens look like. sequences_R: how many each data rank holds."""

    moe: MoeConfig
    parallel: ParallelConfig
    expert: int = 1
    head: int = 1
    tensor: int = 1
    routing: str = "random"
    dtype: DType = "float64"
    recompute: bool = False
    micro_batches: int = 1
    optimizer: str = "adamw"
    steps: int = 3
    compared_in: DType | None = None
    """The dtype whose AdamW epsilon applies, where the right answer is computed in another one; null: `dtype`."""

    @property
    def eps(self) -> float:
        """AdamW's: where gradients are rounded, one that their rounding does not decide."""
        return 1e-8 if (self.compared_in or self.dtype) == "float64" else 1e-3

    @property
    def name(self) -> str:
        p = self.parallel
        how = f"{p.planner}+{p.transport}+{p.residency}+{p.placement}"
        more = ("+recompute" if self.recompute else "") + (
            f"+micro{self.micro_batches}" if self.micro_batches > 1 else ""
        )
        more += f"+budget{p.max_rows_per_rank}" if p.max_rows_per_rank else ""
        more += f"+overlap{p.overlap_chunks}" if p.overlap_chunks > 1 else ""
        return (
            f"{self.moe.router} E={self.moe.num_experts} k={self.moe.top_k} {how}{more} "
            f"ep={self.expert} hp={self.head} tp={self.tensor} {self.routing}"
        )


@dataclass(frozen=True)
class Problem:
    """The whole input of a case, before it is shared among ranks: (S, L, D) tokens, mask, upstream gradient."""

    x_SLD: np.ndarray
    dy_SLD: np.ndarray
    real_SL: np.ndarray
    values: Mapping[str, np.ndarray]
    share_R: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        return max(1, int(self.real_SL.sum()))


@dataclass(frozen=True)
class Report:
    """worst: largest relative error of any tensor; where: which. zeros_ok: structural zeros are exact. digest: of the
    bits of everything that this rank computed."""

    case: Case
    worst: float
    where: str
    zeros_ok: bool
    digest: str

    def passed(self, tolerance: float) -> bool:
        return self.zeros_ok and self.worst <= tolerance


def make_problem(case: Case, ranks: int, values: Mapping[str, np.ndarray], seed: int = 0) -> Problem:
    """Tokens whose first E channels are their router logits (the router's weight is the identity there)."""
    rng = np.random.default_rng(seed)
    per_rank = 2 * case.micro_batches
    share = [per_rank] * ranks
    if case.routing == "idle_rank" and ranks > 1:
        share[-1] = 0
    if case.routing == "uneven":
        share = [case.micro_batches * (1 + r % 3) for r in range(ranks)]
    sequences = sum(share)
    x = rng.standard_normal((sequences, LENGTH, WIDTH))
    num = case.moe.num_experts
    logits = rng.standard_normal((sequences, LENGTH, num))
    if case.routing == "same_experts":
        logits = np.broadcast_to(np.linspace(2, -2, num), logits.shape) + 0.01 * logits
    if case.routing == "ties":
        logits = rng.integers(0, 2, logits.shape).astype(float)
    channels = min(num, WIDTH)
    x[..., :channels] = logits[..., :channels]
    real = np.ones((sequences, LENGTH), bool)
    if case.routing == "padding_tail":
        real[:, LENGTH - 1] = False
        real[0] = False
    if case.routing == "padding_only":
        real[:] = False
    starts = np.cumsum([0, *share])
    parts = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(starts))
    dy = rng.standard_normal(x.shape) * real[..., None]
    if case.dtype == "bfloat16":  # inputs that it holds exactly: what is left is the error of the computation
        x, dy, values = _rounded(x), _rounded(dy), {name: _rounded(value) for name, value in values.items()}
    return Problem(x, dy, real, values, parts)


def _rounded(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 values (ties to even)."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def whole_values(case: Case, runtime: Runtime, seed: int = 0) -> dict[str, np.ndarray]:
    """Every logical tensor of the layer by name; the router sees the first channels as logits."""
    parts = build_layer(case.moe, ParallelConfig(), _single(runtime), _spec(case))
    values: dict[str, np.ndarray] = {}
    for parameter in parts.parameters:
        value = parameter.initial()
        if parameter.name.endswith("w_router") and value.ndim == 2:
            value = np.eye(value.shape[0], value.shape[1]) + 0.0 * value
        for row, piece in enumerate(parameter.pieces or (Piece(parameter.name, parameter.shape),)):
            values[piece.name] = value[row] if parameter.pieces else value
    return values


def check_case(case: Case, backend: Any, runtime: Runtime) -> Report:
    """Run the case on this rank and compare with what the oracle (or the reference on one rank) says."""
    problem = make_problem(case, runtime.mesh.token_ranks, whole_values(case, runtime))
    expected = expected_run(case, problem)
    errors = Errors()
    found = run_steps(case, problem, backend, runtime)
    for got, want in zip(found, expected, strict=True):
        errors.compare_step(got, want, runtime)
    worst, where = errors.worst
    return Report(case, worst, where, errors.zeros_ok, digest_of(found))


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step showed: local or whole, by logical name (and slice) of each tensor."""

    y: dict[int, np.ndarray]
    grads: dict[str, np.ndarray]
    specs: dict[str, Parameter]
    losses: dict[str, float]
    norm: float
    params: dict[str, np.ndarray]


def run_steps(case: Case, problem: Problem, backend: Any, runtime: Runtime) -> list[StepResult]:
    """The layer on this rank: forward, backward, reduction, clipping, update, `case.steps` times."""
    rank = runtime.comm.rank // runtime.mesh.tensor
    mine = problem.share_R[rank]
    parts = build_layer(case.moe, case.parallel, runtime, _spec(case))
    parameters = [replace(p, initial=_initial(p, problem.values)) for p in parts.parameters]
    x_own = problem.x_SLD[list(mine)]
    parameters.append(
        Parameter("x", x_own.shape, lambda: x_own, reduce_over="tensor", norm_over="token", weight_decay=False)
    )
    ops = backend.ops

    def forward(params: Mapping[str, Any], rows: slice) -> MoEOutput:
        count = x_own[rows].shape[0]
        x = params["x"]
        sizes = [rows.start, count, x_own.shape[0] - rows.start - count]
        x_TD = ops.split(x, sizes, 0)[1].reshape((-1, WIDTH))
        real = problem.real_SL[list(mine)][rows].reshape(-1)
        tokens = Tokens(
            sequences=count,
            total=float(problem.total),
            real_T=None if problem.real_SL.all() else ops.asarray(real),
            token_ids_T=ops.asarray(np.arange(len(real)) % 7),
            sequence_positions=np.array(mine, np.int64)[rows],
            global_sequences=len(problem.x_SLD),
        )
        return parts.layer(scoped(params, "moe."), x_TD, tokens, Memo())

    component = Component("moe", tuple(parameters), forward)
    groups = {**runtime.groups, "self": Group("self", (runtime.comm.rank,), 0)}
    options = TrainOptions(dtype=case.dtype, eps=case.eps, optimizer=case.optimizer)  # type: ignore[arg-type]
    state = backend.trainer.build([component], options, groups, runtime.comm)
    specs, results = {p.name: p for p in parameters}, []
    for step in range(case.steps):
        if step and case.parallel.placement == "swap":
            specs = _swap_ends(parts, specs, backend, state, runtime)
        results.append(_one_step(case, problem, backend, state, mine, specs))
    return results


def _swap_ends(
    parts: LayerParts, specs: dict[str, Parameter], backend: Any, state: Any, runtime: Runtime
) -> dict[str, Parameter]:
    """Between two steps the first and the last expert change places; the parameters as they lie then."""
    planner, group = getattr(parts.layer, "planner", None), runtime.groups["expert"]
    if group.size == 1 or planner is None:
        return specs
    layer = PlacedLayer("moe.", planner, tuple(sorted(n for n, p in specs.items() if p.pieces)))
    last = len(rank_of_expert(planner.owned_RC)) - 1
    move = move_of(layer, 0, last, group.index)
    moves = [] if move is None else [move]
    exchange_rows(backend.ops, backend.trainer, state, runtime.comm, group, moves)
    planner.owned_RC = exchanged(planner.owned_RC, 0, last)
    return placed_parameters(specs, [layer], group.index)


def _one_step(
    case: Case, problem: Problem, backend: Any, state: Any, mine: tuple[int, ...], specs: dict[str, Parameter]
) -> StepResult:
    ops, trainer = backend.ops, backend.trainer
    size = max(1, len(mine) // case.micro_batches)
    y: dict[int, np.ndarray] = {}
    losses: dict[str, float] = {}
    for micro in range(case.micro_batches):
        rows = slice(micro * size, (micro + 1) * size) if mine else slice(0, 0)

        def loss_fn(rows: slice = rows) -> tuple[Any, MoEOutput]:
            out = state.modules["moe"](rows)
            dy = ops.cast(ops.asarray(problem.dy_SLD[list(mine)][rows].reshape(-1, WIDTH)), ops.dtype_of(out.y))
            to_one_row = ops.asarray(np.zeros(dy.shape[0], np.int64))  # also right for a rank without rows
            loss = ops.sum_rows(out.y * dy, to_one_row, 1).sum(-1).sum(-1)
            for name, value in out.losses.items():
                loss = loss + times(ops, value, getattr(case.moe, _COEFFICIENT[name]))
            return times(ops, loss, 1.0 / case.tensor), out

        _, out = trainer.accumulate(state, loss_fn)
        flat = ops.to_numpy(out.y)
        for offset, sequence in enumerate(mine[rows]):
            y[sequence] = flat[offset * LENGTH : (offset + 1) * LENGTH]
        for name, value in out.losses.items():
            losses[name] = losses.get(name, 0.0) + float(ops.to_numpy(value))
    trainer.reduce_gradients(state)
    grads = trainer.gradients(state)
    norm = trainer.clip_gradients(state, MAX_NORM)
    trainer.step(state, LEARNING_RATE)
    params = {name: value for name, kind, value in trainer.tensors(state) if kind == "parameter"}
    return StepResult(y, grads, specs, losses, norm, params)


_COEFFICIENT = {"load_balance": "aux_loss_coeff", "z": "z_loss_coeff", "locality": "locality_loss_coeff"}


# --- what is right ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Expected:
    """Whole tensors by logical name after one step; x and its gradient as (S, L, D)."""

    y_SLD: np.ndarray
    grads: dict[str, np.ndarray]
    losses: dict[str, float]
    norm: float
    params: dict[str, np.ndarray]


def expected_run(case: Case, problem: Problem) -> list[Expected]:
    """`case.steps` steps of the oracle with NumPy's AdamW (or SGD); of the reference on one rank where the oracle
    does not know the router."""
    if case.moe.router not in ORACLE_ROUTERS or case.moe.num_heads > 1 or case.moe.capacity_factor is not None:
        return _reference_run(case, problem)
    values = {**problem.values, "x": problem.x_SLD}
    moments: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    run = []
    for step in range(case.steps):
        y, grads, losses = oracle_gradients(case, problem, values)
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        scale = MAX_NORM / norm if norm > MAX_NORM else 1.0
        values = {n: _update(case, n, v, grads[n] * scale, moments, step + 1) for n, v in values.items()}
        run.append(Expected(y, grads, losses, norm, dict(values)))
    return run


def _reference_run(case: Case, problem: Problem) -> list[Expected]:
    from ..backends import reference
    from ..backends.reference.comm import run_ranks

    def alone(comm: Communicator) -> list[Expected]:
        runtime = make_runtime(reference.ops, comm, Mesh())
        whole = replace(problem, share_R=(tuple(range(len(problem.x_SLD))),))
        single = replace(
            case,
            parallel=ParallelConfig(),
            expert=1,
            head=1,
            tensor=1,
            recompute=False,
            micro_batches=1,
            dtype="float64",
            compared_in=case.dtype,
        )
        return [_whole(step) for step in run_steps(single, whole, reference, runtime)]

    return run_ranks(1, alone)[0]


def _whole(step: StepResult) -> Expected:
    """A step of one rank, by logical names."""

    def named(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {piece.name: part for n, v in tensors.items() for piece, part in local_parts(step.specs[n], v)}

    y_SLD = np.stack([step.y[s] for s in sorted(step.y)])
    return Expected(y_SLD, named(step.grads), step.losses, step.norm, named(step.params))


def oracle_gradients(
    case: Case, problem: Problem, values: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
    """y, gradients by logical name and losses of the dense oracle."""
    from ..testing import oracle  # pyright: ignore[reportMissingImports]  # tests/, by the package map

    moe, prefix = case.moe, "moe."
    stack = {
        n: np.stack([values[f"{prefix}experts.{e}.{n}"] for e in range(moe.num_experts)]) for n in ("w_up", "w_down")
    }
    params = {**stack, "w_router": values[f"{prefix}w_router"]}
    shared = [n for n in ("w_shared_up", "w_shared_down", "w_shared_gate") if f"{prefix}{n}" in values]
    params.update({n: values[f"{prefix}{n}"] for n in shared})
    x = values["x"]
    real = None if problem.real_SL.all() else problem.real_SL.reshape(-1)
    batch = oracle.Batch(x.reshape(-1, WIDTH), x.shape[0], float(problem.total), real_T=real)
    result = oracle.run(moe, params, batch, problem.dy_SLD.reshape(-1, WIDTH))  # type: ignore[arg-type]
    grads = {f"{prefix}experts.{e}.{n}": result.grads[n][e] for n in stack for e in range(moe.num_experts)}
    grads.update({f"{prefix}{n}": result.grads[n] for n in ("w_router", *shared)})
    grads["x"] = result.grads["x"].reshape(x.shape)
    return result.y.reshape(x.shape), grads, result.losses


def _update(
    case: Case,
    name: str,
    value: np.ndarray,
    grad: np.ndarray,
    moments: dict[str, tuple[np.ndarray, np.ndarray]],
    step: int,
) -> np.ndarray:
    options = TrainOptions(eps=case.eps)
    decay = 0.0 if name == "x" else options.weight_decay
    if case.optimizer == "sgd":
        return value - LEARNING_RATE * (grad + decay * value)
    m, v = moments.get(name, (np.zeros_like(value), np.zeros_like(value)))
    m = options.beta1 * m + (1 - options.beta1) * grad
    v = options.beta2 * v + (1 - options.beta2) * grad**2
    moments[name] = (m, v)
    m_hat, v_hat = m / (1 - options.beta1**step), v / (1 - options.beta2**step)
    return value * (1 - LEARNING_RATE * decay) - LEARNING_RATE * m_hat / (np.sqrt(v_hat) + options.eps)


# --- comparison ------------------------------------------------------------------------------
@dataclass
class Errors:
    """Largest error so far."""

    worst: tuple[float, str] = (0.0, "")
    zeros_ok: bool = True
    scale: float = field(default=0.0)

    def compare_step(self, got: StepResult, want: Expected, runtime: Runtime) -> None:
        self.scale = FLOOR * max((float(np.linalg.norm(g)) for g in want.grads.values()), default=1.0)
        self.scale = max(self.scale, 1e-12)
        for sequence, y in got.y.items():
            self._add(f"y[{sequence}]", y, want.y_SLD[sequence])
        share = sorted(got.y)
        for kind, found, whole in (("gradient of ", got.grads, want.grads), ("", got.params, want.params)):
            for name, value in found.items():
                if name == "x":
                    self._add(kind + "x", value, whole["x"][share])
                    continue
                for piece, part in local_parts(got.specs[name], value):
                    self._add(kind + piece.name, part, slice_piece(whole[piece.name], piece), bool(kind))
        everyone = runtime.comm.gather_to_host(
            np.array([got.losses.get(n, 0.0) for n in _COEFFICIENT]), runtime.groups["world"]
        )
        for name, value in zip(_COEFFICIENT, everyone.sum(0) / runtime.mesh.tensor):
            if name in got.losses:
                self._add(f"loss {name}", np.array(value), np.array(want.losses[name]))
        self._add("norm", np.array(got.norm), np.array(want.norm))

    def _add(self, name: str, got: np.ndarray, want: np.ndarray, structural: bool = False) -> None:
        if got.size == 0:
            return
        difference = float(np.linalg.norm(got - want))
        error = difference / max(float(np.linalg.norm(want)), self.scale)
        if not error <= self.worst[0]:
            self.worst = (error if np.isfinite(error) else math.inf, name)
        if structural and not want.any() and got.any():
            self.zeros_ok = False
            self.worst = (max(self.worst[0], error), f"{name} (must be exactly zero)")


def local_parts(spec: Parameter, value: np.ndarray) -> list[tuple[Piece, np.ndarray]]:
    """A stored tensor as its logical pieces."""
    return list(zip(spec.pieces, value)) if spec.pieces else [(spec.part or Piece(spec.name, value.shape), value)]


def slice_piece(whole: np.ndarray, piece: Piece) -> np.ndarray:
    """The part of a logical tensor that a piece holds; beyond its end there are zeros (padding of shards)."""
    if piece.stop is None:
        return whole
    if piece.axis is not None:
        return take_part(whole, piece)
    out = np.zeros(piece.stop - piece.start)
    part = whole.reshape(-1)[piece.start : piece.stop]
    out[: len(part)] = part
    return out


def _initial(parameter: Parameter, values: Mapping[str, np.ndarray]) -> Any:
    if not parameter.pieces:
        whole = parameter.part or Piece(parameter.name, parameter.shape)
        return lambda: slice_piece(values[whole.name], whole).reshape(parameter.shape)
    return lambda: np.stack([slice_piece(values[p.name], p) for p in parameter.pieces]).reshape(parameter.shape)


def _spec(case: Case) -> LayerSpec:
    return LayerSpec(WIDTH, "moe.", seed=3, std=0.4, std_down=0.4, checkpoint_experts=case.recompute)


def _single(runtime: Runtime) -> Runtime:
    """The same operations on a mesh of one rank: to list whole parameters."""
    alone = {name: Group(name, (runtime.comm.rank,), 0) for name in runtime.groups}
    return replace(runtime, mesh=Mesh(), groups=alone)
