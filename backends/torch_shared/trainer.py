"""Parameters, gradients and the optimizer in torch: AdamW and FSDP2 are torch's own.

A device home binds these functions to its device (`TorchTrainer(device)`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..protocol import Communicator, Component, DType, Group, Parameter, TrainOptions
from .ops import cast, to_numpy

_BLOCK = 1024
_OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq")


class FunctionModule(nn.Module):
    """A component as nn.Module: its parameters, registered, and its pure function as forward."""

    def __init__(self, component: Component, master: torch.dtype, compute: DType, device: torch.device) -> None:
        super().__init__()
        self._function = component.forward
        self._compute: DType = compute
        self._names = {p.name: p.name.replace(".", "__") for p in component.parameters}
        self._cast = {p.name for p in component.parameters if not p.master}
        for p in component.parameters:
            value = torch.from_numpy(p.initial()).to(device=device, dtype=master)
            self.register_parameter(self._names[p.name], nn.Parameter(value.contiguous()))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        values = {name: getattr(self, attribute) for name, attribute in self._names.items()}
        values = {n: cast(v, self._compute) if n in self._cast else v for n, v in values.items()}
        return self._function(values, *inputs, **named)

    def named(self) -> dict[str, nn.Parameter]:
        """Parameters by their names in the model."""
        return {name: getattr(self, attribute) for name, attribute in self._names.items()}


@dataclass
class TorchState:
    """protocol.State: modules, optimizer, and what reductions and clipping must know of each parameter."""

    modules: Mapping[str, FunctionModule]
    specs: dict[str, Parameter]
    groups: Mapping[str, Group]
    comm: Communicator
    sharded: frozenset[str]
    optimizer: torch.optim.Optimizer
    values: dict[str, nn.Parameter] = field(default_factory=dict)


class TorchTrainer:
    """protocol.Trainer on one torch device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def build(
        self, components: Sequence[Component], options: TrainOptions, groups: Mapping[str, Group], comm: Communicator
    ) -> TorchState:
        master = torch.float64 if options.dtype == "float64" else torch.float32
        modules = {c.name: FunctionModule(c, master, options.dtype, self.device) for c in components}
        specs = {p.name: p for c in components for p in c.parameters}
        sharded: frozenset[str] = frozenset()
        if options.data_sharding == "full" and groups["world"].size > 1:
            sharded = self._shard(modules, specs, groups["world"])
        values = {name: value for module in modules.values() for name, value in module.named().items()}
        optimizer = self._optimizer(specs, values, options, sharded)
        return TorchState(modules, specs, groups, comm, sharded, optimizer, values)

    def _shard(
        self, modules: Mapping[str, FunctionModule], specs: dict[str, Parameter], world: Group
    ) -> frozenset[str]:
        """FSDP2 over the ranks that sum a dense gradient; what other groups reduce stays whole."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(world.handle, self.device.type)
        mine = {name for name, p in specs.items() if p.reduce_over == "world" and p.norm_over is None}
        for module in modules.values():
            ignored = {value for name, value in module.named().items() if name not in mine}
            sharded: Any = fully_shard(module, mesh=mesh, ignored_params=ignored)
            sharded.set_gradient_divide_factor(1.0)
            # gloo has plain sums only
            if self.device.type == "cpu" and hasattr(sharded, "set_force_sum_reduction_for_comms"):
                sharded.set_force_sum_reduction_for_comms(True)
        return frozenset(mine)

    def _optimizer(
        self,
        specs: dict[str, Parameter],
        values: dict[str, nn.Parameter],
        options: TrainOptions,
        sharded: frozenset[str],
    ) -> torch.optim.Optimizer:
        alike: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, value in values.items():  # operations over lists of tensors refuse sharded ones beside whole ones
            alike[specs[name].weight_decay, name in sharded].append(value)
        param_groups = [
            {"params": members, "weight_decay": options.weight_decay if decay else 0.0}
            for (decay, _), members in alike.items()
        ]
        if options.optimizer == "sgd":
            return torch.optim.SGD(param_groups, lr=0.0)
        fused = not sharded and self.device.type in ("cpu", "cuda")
        betas = (options.beta1, options.beta2)
        return torch.optim.AdamW(param_groups, lr=0.0, betas=betas, eps=options.eps, fused=fused or None)

    def module(self, component: Component, groups: Mapping[str, Group], comm: Communicator) -> FunctionModule:
        from .interop import TorchLayerModule

        return TorchLayerModule(component, groups, comm, self.device)

    def accumulate(self, state: TorchState, loss_fn: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        loss, aux = loss_fn()
        loss.backward()
        return loss.detach(), aux

    @torch.no_grad()
    def evaluate(self, state: TorchState, fn: Callable[[], Any]) -> Any:
        return fn()

    def reduce_gradients(self, state: TorchState) -> None:
        by_group: dict[str, list[Tensor]] = defaultdict(list)
        for name, value in state.values.items():
            if name in state.sharded or state.groups[state.specs[name].reduce_over].size == 1:
                continue
            if value.grad is None:
                value.grad = torch.zeros_like(value)
            by_group[state.specs[name].reduce_over].append(value.grad)
        for group_name, grads in by_group.items():
            reduce_flat(grads, state.comm, state.groups[group_name])

    def clip_gradients(self, state: TorchState, max_norm: float | None) -> float:
        squares: dict[str | None, Tensor] = {}
        for name, value in state.values.items():
            if value.grad is None:
                continue
            grad = local(value.grad)
            where = "world" if name in state.sharded else state.specs[name].norm_over
            square = _sum_of_squares(grad)
            squares[where] = squares.get(where, torch.zeros((), device=grad.device)) + square
        total = 0.0
        for where in [None, *sorted(state.groups)]:
            if where is None or state.groups[where].size == 1:
                total += float(squares.get(where, 0.0))
            elif any(p.norm_over == where for p in state.specs.values()) or (where == "world" and state.sharded):
                part = squares.get(where, torch.zeros((), device=self.device))
                total += self.sum_of(part, state.comm, state.groups[where])
        norm = math.sqrt(total)
        if max_norm is not None and norm > max_norm:
            for value in state.values.values():
                if value.grad is not None:
                    value.grad.mul_(max_norm / norm)
        return norm

    def sum_of(self, part: Tensor, comm: Communicator, group: Group) -> float:
        """A number that every rank of a group has its own of, summed in float64."""
        return float(comm.all_reduce(part.double().reshape(1), group))

    def step(self, state: TorchState, learning_rate: float) -> None:
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate
        for value in state.values.values():
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        state.optimizer.step()
        self.forget_gradients(state)

    def forget_gradients(self, state: TorchState) -> None:
        state.optimizer.zero_grad(set_to_none=True)

    def gradients(self, state: TorchState) -> dict[str, np.ndarray]:
        return {
            name: to_numpy(torch.zeros_like(full(value)) if value.grad is None else full(value.grad))
            for name, value in state.values.items()
        }

    def tensors(self, state: TorchState) -> Iterator[tuple[str, str, np.ndarray]]:
        for name, value in state.values.items():
            yield name, "parameter", to_numpy(full(value))
            for kind in _OPTIMIZER_STATE:
                if kind in state.optimizer.state.get(value, {}):
                    yield name, kind, to_numpy(full(state.optimizer.state[value][kind]))

    @torch.no_grad()
    def load_tensors(self, state: TorchState, values: Iterable[tuple[str, str, np.ndarray]], step: int) -> None:
        for name, kind, array in values:
            target: Tensor = state.values[name]
            if kind != "parameter":
                slot = state.optimizer.state[target]
                if kind not in slot:
                    slot[kind] = torch.zeros_like(target)
                    slot["step"] = torch.tensor(float(step), dtype=torch.float32, device=self._step_device(state))
                target = slot[kind]
            _write(target, torch.from_numpy(array.copy()))

    def state_rows(self, state: TorchState, places: Sequence[tuple[str, int]]) -> list[list[Tensor]]:
        return [[kept[row].detach().clone() for kept in _kept(state, name)] for name, row in places]

    @torch.no_grad()
    def write_state_rows(
        self, state: TorchState, places: Sequence[tuple[str, int]], rows: Sequence[Sequence[Tensor]]
    ) -> None:
        for (name, row), values in zip(places, rows, strict=True):
            for kept, value in zip(_kept(state, name), values, strict=True):
                kept[row].copy_(value)

    def _step_device(self, state: TorchState) -> torch.device:
        return self.device if state.optimizer.param_groups[0].get("fused") else torch.device("cpu")

    def peak_memory(self, reset: bool = False) -> int:
        from ..host_memory import peak_resident

        if self.device.type == "cpu":
            return peak_resident(reset)
        device: Any = getattr(torch, self.device.type)
        peak = int(device.max_memory_allocated())
        if reset:
            device.reset_peak_memory_stats()
        return peak

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def _kept(state: TorchState, name: str) -> list[Tensor]:
    """The parameter and what the optimizer keeps of it, in the order of `tensors`."""
    if name in state.sharded:
        raise ValueError(f"{name} is sharded over its rows, which no rank has whole; set data_sharding to 'none'")
    value = state.values[name]
    moments = state.optimizer.state.get(value, {})
    return [value, *(moments[kind] for kind in _OPTIMIZER_STATE if kind in moments)]


def reduce_flat(grads: list[Tensor], comm: Communicator, group: Group) -> None:
    """One all-reduce per dtype for a group's gradients, written back in place."""
    flat = torch.cat([g.reshape(-1) for g in grads])
    flat = comm.all_reduce(flat, group)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def _sum_of_squares(grad: Tensor) -> Tensor:
    """On the host in float64 over blocks: float32 over millions of entries loses digits that clipping would show."""
    if grad.device.type != "cpu":
        return torch.linalg.vector_norm(grad) ** 2
    flat = grad.reshape(-1)
    whole = flat.shape[0] // _BLOCK * _BLOCK
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)
    return norms.double().square().sum() + rest.square()


def local(x: Tensor) -> Tensor:
    return getattr(x, "to_local", lambda: x)()


def full(x: Tensor) -> Tensor:
    return getattr(x, "full_tensor", lambda: x)()


def _write(target: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor that may be a shard of it."""
    if hasattr(target, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        value = distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)
    target.copy_(value)
