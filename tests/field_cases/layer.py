"""A whole layer whose numbers are given: scores are logits that the test writes, expert e multiplies by a[e]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from twinmoe.backends.protocol import Component, Group, Parameter, TrainOptions
from twinmoe.moe_core.build import Runtime, make_runtime
from twinmoe.moe_core.config import MoeConfig, ParallelConfig
from twinmoe.moe_core.layer import MoELayer, MoEOutput
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.placement import Placed
from twinmoe.moe_core.planners.static import owners, plan_static, slot_table
from twinmoe.moe_core.routing import Choice, ChooserRouter, Memo, RouterContext, Tokens, gate
from twinmoe.moe_core.transport.flat import Flat, Local


@dataclass(frozen=True)
class Job:
    """One rank of a running world."""

    backend: Any
    comm: Any

    @property
    def ops(self) -> Any:
        return self.backend.ops

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    def runtime(self, expert: int) -> Runtime:
        return make_runtime(self.ops, self.comm, Mesh.over(self.size, expert=expert))


class GivenLogits:
    """Chooser: scores are `logits` (T, E), plus a shared bias `b` (E,) where there is one."""

    def __init__(self, context: RouterContext) -> None:
        self._context = context

    def parameters(self, prefix: str) -> tuple[Parameter, ...]:
        return ()

    def choose(self, params: Mapping[str, Any], x_TD: Any, tokens: Tokens, memo: Memo) -> Choice:
        logits = params["logits"]
        missing = x_TD.shape[0] - logits.shape[0]  # the row of padding of a rank without tokens
        if missing:
            logits = self._context.ops.concat([logits, self._context.ops.asarray(np.zeros((missing, logits.shape[1])))])
        return gate(self._context, logits + params["b"] if "b" in params else logits, tokens, memo)


class Scaling:
    """Residency: expert e multiplies by a[e], the parameter `a` (own experts, 1, 1)."""

    def __init__(self, ops: Any, width: int) -> None:
        self._ops, self._eye = ops, np.eye(width)[None]

    def parameters(self, prefix: str, std_down: float) -> tuple[Parameter, ...]:
        return ()

    def gather(self, params: Mapping[str, Any], plan: Any) -> Any:
        return params

    def arrived(self, weights: Any) -> Any:
        return weights

    def compute(self, weights: Mapping[str, Any], rows_ND: Any, exchange: Any, plan: Any) -> Any:
        return self._ops.grouped_matmul(rows_ND, weights["a"] * self._ops.asarray(self._eye), exchange.counts_C)


@dataclass(frozen=True)
class Scaled:
    """The layer of `moe` over `expert` ranks; placement: rank of each expert (None: as usual)."""

    job: Job
    moe: MoeConfig
    a: tuple[float, ...]
    expert: int
    width: int = 1
    placement: tuple[int, ...] | None = None
    extra: tuple[Parameter, ...] = ()
    runtime: Runtime = field(init=False)
    layer: MoELayer = field(init=False)

    def __post_init__(self) -> None:
        runtime = self.job.runtime(self.expert)
        group, ops = runtime.groups["expert"], self.job.ops
        rank_E = np.array(self.placement) if self.placement else owners(len(self.a), group.size)
        context = RouterContext(ops, self.moe, self.width, comm=self.job.comm, group=runtime.groups["world"])
        layer = MoELayer(
            ops=ops,
            comm=self.job.comm,
            group=group,
            num_experts=len(self.a),
            router=ChooserRouter(context, GivenLogits(context)),
            planner=Placed(plan_static, slot_table(rank_E, group.size)),
            transport=Flat(ops, self.job.comm, group) if group.size > 1 else Local(ops, len(self.a)),
            residency=Scaling(ops, self.width),
        )
        object.__setattr__(self, "runtime", runtime)
        object.__setattr__(self, "layer", layer)

    @property
    def mine(self) -> list[int]:
        """Experts of this rank, in the order of its stack."""
        table = self.layer.planner.owned_RC  # type: ignore[attr-defined]
        return [int(e) for e in table[self.runtime.groups["expert"].index] if e >= 0]

    def state(self, x: np.ndarray, logits: np.ndarray) -> Any:
        """A trainer's state with parameters a, x, logits and `extra`; its module is layer(tokens, logits)."""
        a = np.array([self.a[e] for e in self.mine]).reshape(-1, 1, 1)
        parameters = (
            Parameter("a", a.shape, a.copy, reduce_over="expert_data", norm_over="expert"),
            Parameter("x", x.shape, x.copy, reduce_over="self", norm_over="world"),
            Parameter("logits", logits.shape, logits.copy, reduce_over="self", norm_over="world"),
            *self.extra,
        )

        def forward(params: Mapping[str, Any], tokens: Tokens, given: Any = None) -> tuple[MoEOutput, Any]:
            values = params if given is None else {**params, "logits": given}
            return self.layer(values, params["x"], tokens, Memo()), params

        groups = {**self.runtime.groups, "self": Group("self", (self.job.rank,), 0)}
        component = Component("layer", parameters, forward)
        options = TrainOptions(dtype="float64", optimizer="sgd")
        return self.job.backend.trainer.build([component], options, groups, self.job.comm)


def total(ops: Any, y_TD: Any) -> Any:
    """Sum of all elements, right for no rows too."""
    return ops.sum_rows(y_TD, ops.asarray(np.zeros(y_TD.shape[0], np.int64)), 1).sum(-1).sum(-1)


@dataclass(frozen=True)
class Seen:
    """y and the reduced gradients of one step, on the host."""

    y: np.ndarray
    grads: dict[str, np.ndarray]
    loss: float


def one_step(scaled: Scaled, x: Any, logits: Any, scale: float = 1.0, **fields: Any) -> Seen:
    """Loss = scale x sum of y over all tokens: forward, backward, reduction. `fields`: of Tokens."""
    x, logits = np.array(x, np.float64), np.array(logits, np.float64)
    ops, trainer = scaled.job.ops, scaled.job.backend.trainer
    state = scaled.state(x, logits)
    tokens = Tokens(**{"sequences": 1 if len(x) else 0, "total": float(len(x)), **fields})

    def loss_fn() -> tuple[Any, Any]:
        out, params = state.modules["layer"](tokens)
        y = out.y * params["d"] if "d" in params else out.y
        return total(ops, y) * scale, y

    loss, y = trainer.accumulate(state, loss_fn)
    trainer.reduce_gradients(state)
    return Seen(ops.to_numpy(y), trainer.gradients(state), float(ops.to_numpy(loss)))


def settings(**fields: Any) -> MoeConfig:
    """A MoeConfig in float64 without losses unless asked for; a weight is the probability itself."""
    plain = {"aux_loss_coeff": 0.0, "router_dtype": "float64", "top_k": 1, "norm_topk_prob": False}
    return MoeConfig(**{**plain, **fields})


def parallel(**fields: Any) -> ParallelConfig:
    return ParallelConfig.model_validate(fields)


def close(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
