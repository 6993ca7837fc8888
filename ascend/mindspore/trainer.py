"""Parameters, gradients and the optimizer over `mindspore.value_and_grad`; PyNative mode.

The functions here serve every device; `host_trainer` and `npu_trainer` add what depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import Parameter as Weight
from mindspore import Tensor

from ...backends.protocol import Communicator, Component, DType, Group, Parameter, TrainOptions
from .autograd import value_and_grad
from .cell import FunctionCell, make_weight
from .framework import mint, ops
from .interop import LayerCell
from .ops import asarray, number, to_numpy
from .optimizer import Moments, Rate, update
from .sharding import Shards, shards_of

MOMENTS = ("exp_avg", "exp_avg_sq")
Update = Callable[[Weight, Tensor, Moments | None, TrainOptions, Rate], None]


def squares(gradients: Sequence[Tensor]) -> float:
    """Sum of all squares: per tensor on the device, over tensors in float64 on the host."""
    found = [(g * g).reshape((-1,)).sum(0).reshape((1,)) for g in gradients]
    return float(to_numpy(mint.cat(found)).astype(np.float64).sum())


@dataclass
class MindSporeState:
    """protocol.State. Components that name the same parameter share its tensor; `shards` of those that are cut."""

    modules: Mapping[str, FunctionCell]
    parameters: Mapping[str, Parameter]
    weights: Mapping[str, Weight]
    shards: Mapping[str, Shards]
    options: TrainOptions
    groups: Mapping[str, Group]
    comm: Communicator
    moments: Mapping[str, Moments]
    update: Update = update
    squares: Callable[[Sequence[Tensor]], float] = squares
    grads: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0


def build(
    components: Sequence[Component], options: TrainOptions, groups: Mapping[str, Group], comm: Communicator
) -> MindSporeState:
    """Make the cells, draw the parameters in at least float32, prepare the optimizer."""
    parameters = {p.name: p for c in components for p in c.parameters}
    shards = _shards(parameters, groups, comm) if options.data_sharding == "full" else {}
    master: DType = "float64" if options.dtype == "float64" else "float32"
    weights = {}
    for name, parameter in parameters.items():
        value = parameter.initial()
        weights[name] = make_weight(name, shards[name].cut(value) if name in shards else value, master)
    modules = {c.name: FunctionCell(c, weights, options.dtype, shards) for c in components}
    moments = {} if options.optimizer == "sgd" else {name: Moments.zeros(w) for name, w in weights.items()}
    return MindSporeState(modules, parameters, weights, shards, options, groups, comm, moments)


def _shards(parameters: Mapping[str, Parameter], groups: Mapping[str, Group], comm: Communicator) -> dict[str, Shards]:
    found = {name: shards_of(p, groups["world"], comm) for name, p in parameters.items()}
    return {name: s for name, s in found.items() if s is not None}


def module(component: Component, groups: Mapping[str, Group], comm: Communicator) -> LayerCell:
    """One component as nn.Cell in float32, for other people's loops."""
    return LayerCell(component, groups, comm)


def accumulate(state: MindSporeState, loss_fn: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """Run loss_fn (which calls state.modules), add its gradients to the state's; returns (loss, aux).

    aux leaves through a list: MindSpore converts what a differentiated function returns.
    """
    kept: list[Any] = []

    def loss_alone() -> Tensor:
        loss, aux = loss_fn()
        kept.append(aux)
        return loss

    loss, found = value_and_grad(loss_alone, list(state.weights.values()))
    for name, gradient in zip(state.weights, found, strict=True):
        state.grads[name] = state.grads[name] + gradient if name in state.grads else gradient
    return loss, kept[0]


def evaluate(state: MindSporeState, fn: Callable[[], Any]) -> Any:
    """fn() without gradients: MindSpore records only inside `value_and_grad`."""
    return fn()


def reduce_gradients(state: MindSporeState) -> None:
    """Sum each gradient over its parameter's `reduce_over` group: one all-reduce per group."""
    for group_name in sorted({p.reduce_over for p in state.parameters.values()}):
        group = state.groups[group_name]
        names = [n for n, p in state.parameters.items() if p.reduce_over == group_name and n not in state.shards]
        if group.size == 1 or not names:
            continue
        grads = [_gradient(state, n) for n in names]
        flat = state.comm.all_reduce(mint.cat([g.reshape((-1,)) for g in grads]), group)
        for name, part in zip(names, mint.split(flat, [g.size for g in grads]), strict=True):
            state.grads[name] = part.reshape(state.weights[name].shape)


def _gradient(state: MindSporeState, name: str) -> Tensor:
    return state.grads[name] if name in state.grads else ops.zeros_like(state.weights[name])


def clip_gradients(state: MindSporeState, max_norm: float | None) -> float:
    """The global norm, each parameter counted once; scales gradients when it exceeds max_norm.

    Squares are summed per tensor on the device, over tensors and ranks in float64 on the host, in one order:
    every rank gets the same norm, and HCCL reduces no float64.
    """
    owners = {n: "world" if n in state.shards else p.norm_over for n, p in state.parameters.items()}
    total = 0.0
    for owner in sorted(set(owners.values()), key=lambda name: name or ""):
        mine = [state.grads[n] for n in owners if owners[n] == owner and n in state.grads and state.grads[n].size]
        part = state.squares(mine) if mine else 0.0
        if owner is not None:
            part = float(state.comm.gather_to_host(np.array([part]), state.groups[owner]).sum())
        total += part
    norm = math.sqrt(total)
    if max_norm is not None and norm > max_norm:
        state.grads = {name: g * number(max_norm / norm, g) for name, g in state.grads.items()}
    return norm


def step(state: MindSporeState, learning_rate: float) -> None:
    """One optimizer update, then gradients are forgotten."""
    state.updates += 1
    for name, weight in state.weights.items():
        decay = state.options.weight_decay if state.parameters[name].weight_decay else 0.0
        rate = Rate(learning_rate, decay, state.updates)
        state.update(weight, _gradient(state, name), state.moments.get(name), state.options, rate)
    forget_gradients(state)


def forget_gradients(state: MindSporeState) -> None:
    """Drop what was accumulated, without an update."""
    state.grads = {}


def _to_host(state: MindSporeState, name: str, value: Tensor) -> np.ndarray:
    return state.shards[name].to_host(value) if name in state.shards else to_numpy(value)


def gradients(state: MindSporeState) -> dict[str, np.ndarray]:
    """Local gradients by parameter name, on the host (zeros where none). Collective where parameters are sharded."""
    return {name: _to_host(state, name, _gradient(state, name)) for name in state.weights}


def tensors(state: MindSporeState) -> Iterator[tuple[str, str, np.ndarray]]:
    """(parameter name, kind, local value): kind is 'parameter', 'exp_avg' or 'exp_avg_sq'; shards are gathered."""
    for name, weight in state.weights.items():
        yield name, "parameter", _to_host(state, name, weight)
        if name in state.moments:
            for kind in MOMENTS:
                yield name, kind, _to_host(state, name, getattr(state.moments[name], kind))


def load_tensors(state: MindSporeState, values: Iterable[tuple[str, str, np.ndarray]], step: int) -> None:
    """Write local values back in place; `step` = optimizer updates done. ValueError where a shape differs."""
    for name, kind, array in values:
        expected = tuple(state.parameters[name].shape)
        if tuple(array.shape) != expected:
            raise ValueError(
                f"{kind} of {name} has shape {array.shape}, the model wants {expected}; load its own layout"
            )
        target = state.weights[name] if kind == "parameter" else getattr(state.moments[name], kind)
        local = state.shards[name].cut(array) if name in state.shards else array
        ops.assign(target, asarray(local).astype(target.dtype))
    state.updates = step


def state_rows(state: MindSporeState, places: Sequence[tuple[str, int]]) -> list[list[Tensor]]:
    """Copies of one row of a parameter and of each tensor that the optimizer keeps of it, on the device."""
    return [
        [mint.narrow(kept, 0, row, 1).reshape(kept.shape[1:]).copy() for kept in _kept(state, name)]
        for name, row in places
    ]


def write_state_rows(
    state: MindSporeState, places: Sequence[tuple[str, int]], rows: Sequence[Sequence[Tensor]]
) -> None:
    """Write rows as `state_rows` gives them, in place."""
    for (name, row), values in zip(places, rows, strict=True):
        where = Tensor(np.array([row], np.int32))
        for kept, value in zip(_kept(state, name), values, strict=True):
            ops.scatter_update(kept, where, value.reshape((1, *kept.shape[1:])))


def _kept(state: MindSporeState, name: str) -> list[Weight]:
    """The parameter and what the optimizer keeps of it, in the order of `tensors`."""
    if name in state.shards:
        raise ValueError(f"{name} is sharded over its rows, which no rank has whole; set data_sharding to 'none'")
    moments = state.moments.get(name)
    return [state.weights[name], *(() if moments is None else (getattr(moments, kind) for kind in MOMENTS))]
