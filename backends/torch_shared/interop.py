"""An MoE layer inside somebody else's torch model: what DDP and FSDP2 must not do to experts, done right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..protocol import Communicator, Component, Group, Piece
from .ops import to_numpy
from .trainer import FunctionModule, full, local, reduce_flat

_NAMES: dict[torch.dtype, Any] = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16"}


class TorchLayerModule(FunctionModule):
    """protocol.LayerModule: a component that knows which of its parameters belong to this rank alone."""

    def __init__(
        self,
        component: Component,
        groups: Mapping[str, Group],
        comm: Communicator,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        dtype = dtype or torch.get_default_dtype()
        super().__init__(component, dtype, _named(dtype), device)
        self._device = device.type
        self._specs = {p.name: p for p in component.parameters}
        self._groups, self._comm = groups, comm

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Computes in the dtype of the parameters, as `.to(dtype)` left them, outside autocast; floating inputs are
        converted, and the output has the dtype of the first of them. TypeError for a dtype that no kernel has."""
        self._refuse_raw_ddp()
        dtype = self._follow_parameters()
        given = next((v.dtype for v in (*inputs, *named.values()) if _floating(v)), dtype)
        with torch.autocast(self._device, enabled=False):
            out = self.run(*(_as(v, dtype) for v in inputs), **{name: _as(v, dtype) for name, v in named.items()})
            return out if given == dtype else _output(out, given)

    def run(self, *inputs: Any, **named: Any) -> Any:
        """The component's function of the parameters."""
        return super().forward(*inputs, **named)

    def _follow_parameters(self) -> torch.dtype:
        """The dtype of the parameters that are not kept in a precision of their own."""
        found = [getattr(self, self._names[name]).dtype for name in self._names if name in self._cast]
        if not found:
            return next((dtype for dtype, name in _NAMES.items() if name == self._compute))
        self._compute = _named(found[0])
        return found[0]

    def _refuse_raw_ddp(self) -> None:
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is None or self._comm.size == 1:
            return
        mine = {id(p) for p in self.expert_parameters()}
        ignored = ddp.parameters_to_ignore
        for name, parameter in ddp.module.named_parameters():
            if id(parameter) in mine and name not in ignored:
                raise RuntimeError(
                    f"DistributedDataParallel would average the expert parameter {name} over ranks that hold different "
                    "experts; call twinmoe.moe_core.exclude_experts(layer, model) before wrapping the model"
                )

    def is_expert(self, name: str) -> bool:
        """Whether a parameter differs between ranks."""
        spec = self._specs[name]
        return spec.norm_over is not None or spec.reduce_over != "world"

    def norm_over(self, name: str) -> str | None:
        """Name of the group whose ranks hold the other parts of a parameter."""
        return self._specs[name].norm_over

    def expert_parameters(self) -> list[nn.Parameter]:
        return [value for name, value in self.named().items() if self.is_expert(name)]

    def sync_gradients(self, gradients: Any = None) -> None:
        for name, value in self.named().items():
            # frozen: a zero gradient would let AdamW decay it; every rank's layer is frozen alike, so all skip
            if not self.is_expert(name) or not value.requires_grad:
                continue
            if value.grad is None:
                value.grad = torch.zeros_like(value)
            group = self._groups[self._specs[name].reduce_over]
            if group.size > 1:
                reduce_flat([value.grad], self._comm, group)
            value.grad.div_(self._comm.size)

    @torch.no_grad()
    def clip_grad_norm(self, model: nn.Module, max_norm: float, gradients: Any = None) -> float:
        owners = _owners(model)
        # counted as they are (None), or summed over the ranks that hold the other parts; FSDP shards over all ranks
        squares: dict[str | None, float] = dict.fromkeys((None, "world", *owners.values()), 0.0)
        for parameter in model.parameters():
            if parameter.grad is not None:
                where = owners.get(id(parameter), "world" if hasattr(parameter.grad, "to_local") else None)
                squares[where] += float(torch.linalg.vector_norm(local(parameter.grad).double()) ** 2)
        device, total = next(model.parameters()).device, squares.pop(None)
        for name in sorted(n for n in squares if n is not None):
            part = torch.tensor([squares[name]], dtype=torch.float64)
            total += self._sum(part, self._groups[name], device)
        norm = math.sqrt(total)
        if norm > max_norm:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(max_norm / norm)
        return norm

    def _sum(self, square: Tensor, group: Group, device: torch.device) -> float:
        return float(self._comm.all_reduce(square.to(device), group))

    @staticmethod
    def exclude_experts(model: nn.Module) -> None:
        """Tell DistributedDataParallel, before it wraps `model`, to leave expert parameters alone."""
        mine = _expert_identities(model)
        names = [name for name, parameter in model.named_parameters() if id(parameter) in mine]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)

    def layer_state_dict(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name, value in self.named().items():
            array = to_numpy(full(value))
            pieces = self._specs[name].pieces
            rows = zip(pieces, array, strict=True) if pieces else [(Piece(name, array.shape), array)]
            found.update({piece.name: np.array(row) for piece, row in rows})
        return found


def _named(dtype: torch.dtype) -> Any:
    if dtype not in _NAMES:
        raise TypeError(f"the layer does not compute in {dtype}; use .to(torch.bfloat16), .float() or .double()")
    return _NAMES[dtype]


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if _floating(value) else value


def _output(out: Any, dtype: torch.dtype) -> Any:
    """A tensor, or the y of a record, in the caller's dtype; losses stay as they are."""
    return replace(out, y=_as(out.y, dtype)) if hasattr(out, "y") else _as(out, dtype)


def _owners(model: nn.Module) -> dict[int, str | None]:
    """Group whose ranks hold disjoint parts, for each parameter that differs between ranks."""
    layers = [m for m in model.modules() if isinstance(m, TorchLayerModule)]
    return {
        id(p): layer.norm_over(name) for layer in layers for name, p in layer.named().items() if layer.is_expert(name)
    }


def _expert_identities(model: nn.Module) -> set[int]:
    layers = [m for m in model.modules() if isinstance(m, TorchLayerModule)]
    return {id(p) for layer in layers for p in layer.expert_parameters()}
