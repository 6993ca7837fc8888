"""Parameters, gradients and optimizers of the reference: the formulas of AdamW and SGD, written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..host_memory import peak_resident
from ..protocol import Communicator, Component, Group, Parameter, TrainOptions
from .interop import Module, ReferenceLayerModule
from .tape import Var, grad, variable

Arrays = dict[str, np.ndarray]


@dataclass
class ReferenceState:
    """protocol.State. Components that name the same parameter share its leaf."""

    modules: Mapping[str, Module]
    parameters: Mapping[str, Parameter]
    leaves: Mapping[str, Var]
    options: TrainOptions
    groups: Mapping[str, Group]
    comm: Communicator
    grads: Arrays = field(default_factory=dict)
    exp_avg: Arrays = field(default_factory=dict)
    exp_avg_sq: Arrays = field(default_factory=dict)
    updates: int = 0


def build(
    components: Sequence[Component], options: TrainOptions, groups: Mapping[str, Group], comm: Communicator
) -> ReferenceState:
    """ValueError for sharded data parallelism, which the reference does not have."""
    if options.data_sharding != "none":
        raise ValueError(f"the reference does not shard (data_sharding={options.data_sharding!r}); set it to 'none'")
    parameters = {p.name: p for c in components for p in c.parameters}
    leaves = {name: variable(p.initial()) for name, p in parameters.items()}
    modules = {c.name: Module(c.forward, {p.name: leaves[p.name] for p in c.parameters}) for c in components}
    state = ReferenceState(modules, parameters, leaves, options, groups, comm)
    forget_gradients(state)
    if options.optimizer == "adamw":
        state.exp_avg = {name: np.zeros(leaf.shape) for name, leaf in leaves.items()}
        state.exp_avg_sq = {name: np.zeros(leaf.shape) for name, leaf in leaves.items()}
    return state


def module(component: Component, groups: Mapping[str, Group], comm: Communicator) -> ReferenceLayerModule:
    return ReferenceLayerModule(component, groups, comm)


def accumulate(state: ReferenceState, loss_fn: Callable[[], tuple[Var, Any]]) -> tuple[Var, Any]:
    loss, aux = loss_fn()
    found = grad(loss, list(state.leaves.values()))
    state.grads = {name: old + new for (name, old), new in zip(state.grads.items(), found, strict=True)}
    return Var(loss.value), aux


def evaluate(state: ReferenceState, fn: Callable[[], Any]) -> Any:
    """fn() while the leaves ask for no gradient, so that the tape records nothing."""
    for leaf in state.leaves.values():
        leaf.needs_grad = False
    try:
        return fn()
    finally:
        for leaf in state.leaves.values():
            leaf.needs_grad = True


def reduce_gradients(state: ReferenceState) -> None:
    """One all-reduce per group, over the flattened gradients of its parameters."""
    for group_name in sorted({p.reduce_over for p in state.parameters.values()}):
        group = state.groups[group_name]
        names = [n for n, p in state.parameters.items() if p.reduce_over == group_name]
        if group.size == 1:
            continue
        flat = Var(np.concatenate([state.grads[n].reshape(-1) for n in names]))
        total = state.comm.all_reduce(flat, group).value
        ends = np.cumsum([state.grads[n].size for n in names])[:-1]
        for name, part in zip(names, np.split(total, ends), strict=True):
            state.grads[name] = part.reshape(state.grads[name].shape)


def clip_gradients(state: ReferenceState, max_norm: float | None) -> float:
    """sqrt of the sum of squares; parts spread over a `norm_over` group are summed there, once."""
    total = 0.0
    for owner in sorted({p.norm_over for p in state.parameters.values()}, key=lambda name: name or ""):
        names = [n for n, p in state.parameters.items() if p.norm_over == owner]
        square = Var(sum(float((state.grads[n] ** 2).sum()) for n in names))
        if owner is not None and state.groups[owner].size > 1:
            square = state.comm.all_reduce(square, state.groups[owner])
        total += float(square.value)
    norm = math.sqrt(total)
    if max_norm is not None and norm > max_norm:
        state.grads = {name: g * (max_norm / norm) for name, g in state.grads.items()}
    return norm


def step(state: ReferenceState, learning_rate: float) -> None:
    state.updates += 1
    for name, leaf in state.leaves.items():
        decay = state.options.weight_decay if state.parameters[name].weight_decay else 0.0
        leaf.value = leaf.value * (1 - learning_rate * decay) - learning_rate * _direction(state, name)
    forget_gradients(state)


def forget_gradients(state: ReferenceState) -> None:
    state.grads = {name: np.zeros(leaf.shape) for name, leaf in state.leaves.items()}


def _direction(state: ReferenceState, name: str) -> np.ndarray:
    """The gradient (SGD), or m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) (AdamW, Loshchilov and Hutter, alg. 2)."""
    g, o, t = state.grads[name], state.options, state.updates
    if o.optimizer == "sgd":
        return g
    m = state.exp_avg[name] = o.beta1 * state.exp_avg[name] + (1 - o.beta1) * g
    v = state.exp_avg_sq[name] = o.beta2 * state.exp_avg_sq[name] + (1 - o.beta2) * g * g
    return m / (1 - o.beta1**t) / (np.sqrt(v / (1 - o.beta2**t)) + o.eps)


def gradients(state: ReferenceState) -> dict[str, np.ndarray]:
    return {name: g.copy() for name, g in state.grads.items()}


def tensors(state: ReferenceState) -> Iterator[tuple[str, str, np.ndarray]]:
    for name, leaf in state.leaves.items():
        yield name, "parameter", leaf.value.copy()
        if state.options.optimizer == "adamw":
            yield name, "exp_avg", state.exp_avg[name].copy()
            yield name, "exp_avg_sq", state.exp_avg_sq[name].copy()


def load_tensors(state: ReferenceState, values: Iterable[tuple[str, str, np.ndarray]], step: int) -> None:
    """KeyError for an unknown parameter or kind; ValueError for another shape."""
    for name, kind, value in values:
        leaf = state.leaves[name]
        if value.shape != leaf.shape:
            raise ValueError(f"{kind} of {name} has shape {value.shape}, not {leaf.shape}; load it on the same layout")
        new = np.array(value, np.float64)
        if kind == "parameter":
            leaf.value = new
        else:
            {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}[kind][name] = new
    state.updates = step


def state_rows(state: ReferenceState, places: Sequence[tuple[str, int]]) -> list[list[Var]]:
    return [[Var(kept[row].copy()) for kept in _kept(state, name)] for name, row in places]


def write_state_rows(state: ReferenceState, places: Sequence[tuple[str, int]], rows: Sequence[Sequence[Var]]) -> None:
    for (name, row), values in zip(places, rows, strict=True):
        for kept, value in zip(_kept(state, name), values, strict=True):
            kept[row] = value.value


def _kept(state: ReferenceState, name: str) -> list[np.ndarray]:
    """The parameter and what the optimizer keeps of it, in the order of `tensors`."""
    moments = (state.exp_avg, state.exp_avg_sq)
    return [state.leaves[name].value, *(kind[name] for kind in moments if name in kind)]


def peak_memory(reset: bool = False) -> int:
    return peak_resident(reset)


def synchronize() -> None:
    """NumPy has finished when it returns."""
