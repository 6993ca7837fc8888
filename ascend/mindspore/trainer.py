"""Parameters, gradients and the optimizer over `mindspore.value_and_grad`; PyNative mode.

The functions here serve every device; `host_trainer` and `npu_trainer` add what depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter as Weight
from mindspore import Tensor, mint, nn, ops

from ...backends.protocol import Communicator, Component, DType, Group, Parameter, TrainOptions
from .ops import asarray, cast, number, to_numpy
from .optimizer import Moments, Rate, update

MOMENTS = ("exp_avg", "exp_avg_sq")


class FunctionCell(nn.Cell):
    """A component as nn.Cell: its parameters, registered, and its pure function as construct."""

    def __init__(self, component: Component, weights: Mapping[str, Weight], dtype: DType) -> None:
        super().__init__(auto_prefix=False)
        self._pure = component.forward
        self._dtype: DType = dtype
        self._kept = frozenset(p.name for p in component.parameters if p.master)
        self._weights = {p.name: weights[p.name] for p in component.parameters}
        for name, weight in self._weights.items():
            self.insert_param_to_cell(name.replace(".", "__"), weight, check_name_contain_dot=False)

    def construct(self, *inputs: Any) -> Any:
        params = {n: w if n in self._kept else cast(w, self._dtype) for n, w in self._weights.items()}
        return self._pure(params, *inputs)


@dataclass
class MindSporeState:
    """protocol.State. Components that name the same parameter share its tensor."""

    modules: Mapping[str, FunctionCell]
    parameters: Mapping[str, Parameter]
    weights: Mapping[str, Weight]
    options: TrainOptions
    groups: Mapping[str, Group]
    comm: Communicator
    moments: dict[str, Moments]
    grads: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0


def build(
    components: Sequence[Component], options: TrainOptions, groups: Mapping[str, Group], comm: Communicator
) -> MindSporeState:
    """Make the cells, draw the parameters in at least float32, prepare the optimizer."""
    if options.data_sharding != "none":
        raise ValueError(f"MindSpore backends do not shard (data_sharding={options.data_sharding!r}); set it to 'none'")
    parameters = {p.name: p for c in components for p in c.parameters}
    master: DType = "float64" if options.dtype == "float64" else "float32"
    weights = {name: _weight(p, master) for name, p in parameters.items()}
    modules = {c.name: FunctionCell(c, weights, options.dtype) for c in components}
    moments = {} if options.optimizer == "sgd" else {name: Moments.zeros(w) for name, w in weights.items()}
    return MindSporeState(modules, parameters, weights, options, groups, comm, moments)


def _weight(parameter: Parameter, dtype: DType) -> Weight:
    return Weight(cast(asarray(parameter.initial()), dtype), name=parameter.name)


def module(component: Component) -> FunctionCell:
    """One component as nn.Cell in float32, for other people's loops."""
    return FunctionCell(component, {p.name: _weight(p, "float32") for p in component.parameters}, "float32")


def accumulate(state: MindSporeState, loss_fn: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """Run loss_fn (which calls state.modules), add its gradients to the state's; returns (loss, aux).

    aux leaves through a list: MindSpore converts what a differentiated function returns.
    """
    kept: list[Any] = []

    def loss_alone() -> Tensor:
        loss, aux = loss_fn()
        kept.append(aux)
        return loss

    names = list(state.weights)
    loss, found = ms.value_and_grad(loss_alone, None, weights=tuple(state.weights.values()))()
    for name, gradient in zip(names, found, strict=True):
        state.grads[name] = state.grads[name] + gradient if name in state.grads else gradient
    return loss, kept[0]


def evaluate(state: MindSporeState, fn: Callable[[], Any]) -> Any:
    """fn() without gradients: MindSpore records only inside `value_and_grad`."""
    return fn()


def reduce_gradients(state: MindSporeState) -> None:
    """Sum each gradient over its parameter's `reduce_over` group: one all-reduce per group and dtype."""
    for group_name in sorted({p.reduce_over for p in state.parameters.values()}):
        group = state.groups[group_name]
        names = [n for n, p in state.parameters.items() if p.reduce_over == group_name]
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

    Squares are summed per tensor on the device, over tensors and ranks in float64 on the host, in one order.
    """
    total = 0.0
    for owner in sorted({p.norm_over for p in state.parameters.values()}, key=lambda name: name or ""):
        names = [n for n, p in state.parameters.items() if p.norm_over == owner and n in state.grads]
        squares = [_square(state.grads[n]) for n in names]
        part = np.float64(0.0) if not squares else to_numpy(mint.cat(squares)).astype(np.float64).sum()
        if owner is not None:
            part = state.comm.gather_to_host(np.array([part]), state.groups[owner]).sum()
        total += float(part)
    norm = math.sqrt(total)
    if max_norm is not None and norm > max_norm:
        state.grads = {name: g * number(max_norm / norm, g) for name, g in state.grads.items()}
    return norm


def _square(gradient: Tensor) -> Tensor:
    return (gradient * gradient).reshape((-1,)).sum(0).reshape((1,))


def step(state: MindSporeState, learning_rate: float) -> None:
    """One optimizer update, then gradients are forgotten."""
    state.updates += 1
    for name, weight in state.weights.items():
        decay = state.options.weight_decay if state.parameters[name].weight_decay else 0.0
        gradient = _gradient(state, name)
        rate = Rate(learning_rate, decay, state.updates)
        update(weight, gradient, state.moments.get(name), state.options, rate)
    state.grads = {}


def gradients(state: MindSporeState) -> dict[str, np.ndarray]:
    """Local gradients by parameter name, on the host (zeros where none)."""
    return {name: to_numpy(_gradient(state, name)) for name in state.weights}


def tensors(state: MindSporeState) -> Iterator[tuple[str, str, np.ndarray]]:
    """(parameter name, kind, local value): kind is 'parameter', 'exp_avg' or 'exp_avg_sq'."""
    for name, weight in state.weights.items():
        yield name, "parameter", to_numpy(weight)
        if name in state.moments:
            for kind in MOMENTS:
                yield name, kind, to_numpy(getattr(state.moments[name], kind))


def load_tensors(state: MindSporeState, values: Iterable[tuple[str, str, np.ndarray]], step: int) -> None:
    """Write local values back in place; `step` = optimizer updates done."""
    for name, kind, array in values:
        weight = state.weights[name]
        target = weight if kind == "parameter" else getattr(state.moments[name], kind)
        if tuple(array.shape) != tuple(target.shape):
            raise ValueError(f"{kind} of {name} has shape {array.shape}, the model wants {tuple(target.shape)}")
        ops.assign(target, asarray(array).astype(target.dtype))
    state.updates = step
