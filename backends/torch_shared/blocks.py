"""The expert modules of a loaded transformers model as modules of ours: found, swapped, trained, put back.

Their router, shared expert and balance loss stay; what a token's chosen experts compute is ours, wherever they are.
Expert gradients are reduced by hooks while backward runs, so that someone else's loop has nothing to call; a norm over
all ranks is the one thing that it can't know (`ExpertClipping`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from ..protocol import Communicator, Component, Group
from .interop import TorchLayerModule
from .trainer import reduce_flat

_NAMES: dict[torch.dtype, Any] = {getattr(torch, n): n for n in ("float64", "float32", "bfloat16", "float16")}
_TENSORS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Block:
    """One module of experts. name: its place in the model; woven: gate and linear columns alternate (gpt-oss)."""

    name: str
    module: Any
    woven: bool

    @property
    def num_experts(self) -> int:
        return self.module.gate_up_proj.shape[0]

    @property
    def width(self) -> int:
        return self.module.down_proj.shape[2 if self.woven else 1]

    @property
    def hidden(self) -> int:
        return self.module.down_proj.shape[1 if self.woven else 2]

    def expert(self, expert: int, name: str) -> np.ndarray:
        """w_up, w_down, b_up or b_down of one expert, as ours stores it."""
        there = {"w_up": "gate_up_proj", "w_down": "down_proj", "b_up": "gate_up_proj_bias", "b_down": "down_proj_bias"}
        value = getattr(self.module, there[name]).detach()[expert]
        value = (value.double() if value.dtype == torch.float64 else value.float()).cpu()
        if not self.woven:
            return value.T.contiguous().numpy()
        return (torch.cat([value[..., ::2], value[..., 1::2]], -1) if name.endswith("up") else value).numpy()


def find(model: nn.Module) -> list[Block]:
    """Modules that hold all experts of a layer in stacks, as transformers 5 does. ValueError if there are none."""
    found = []
    for name, module in model.named_modules():
        if all(getattr(module, n, None) is not None and getattr(module, n).dim() == 3 for n in _TENSORS):
            woven = hasattr(module, "gate_up_proj_bias")
            if (
                not woven
                and not isinstance(module.act_fn, nn.SiLU)
                and type(module.act_fn).__name__ != "SiLUActivation"
            ):
                raise ValueError(f"{name} has the activation {module.act_fn}, which is not offered; only SiLU is")
            found.append(Block(name, module, woven))
    if not found:
        raise ValueError("no module of the model holds experts as transformers 5 stores them (gate_up_proj, down_proj)")
    return found


class ExpertsModule(TorchLayerModule):
    """What stands where a module of experts stood: forward(x_TD, ids_TK, weights_TK) -> y_TD."""

    def __init__(self, component: Component, groups: Mapping[str, Group], comm: Communicator, block: Block) -> None:
        stored: Tensor = block.module.down_proj
        super().__init__(component, groups, comm, stored.device, stored.dtype)
        self._woven, self._checked = block.woven, comm.size == 1
        self._original = (block.module.to("meta"),)  # in a tuple it is no sub-module
        self.gathering = False
        self.register_state_dict_pre_hook(_refuse_part)
        for name, value in self.named().items():
            value.register_hook(lambda gradient, name=name: self._reduced(name, gradient))

    def forward(self, *inputs: Tensor) -> Tensor:
        x_TD, ids_TK, weights_TK = inputs
        if self.training and torch.is_grad_enabled() and not self._checked:
            refuse_wrong_clipping()
            self._checked = True
        self._refuse_raw_ddp()
        if any(hasattr(value, "to_local") for value in self.named().values()):
            raise RuntimeError(
                "the experts were sharded by FSDP, which knows nothing of their ranks; pass "
                "twinmoe.moe_core.expert_parameters(module) of each as ignored_params, or use DDP"
            )
        device = x_TD.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else next(iter(self.named().values())).dtype
        self._compute = _NAMES[dtype]
        with torch.autocast(device, enabled=False):
            y_TD = self.run(x_TD.to(dtype), ids_TK, weights_TK, self.training)
        return y_TD.to(x_TD.dtype)

    def _reduced(self, name: str, gradient: Tensor) -> Tensor:
        """What backward adds to a gradient, as the mean over ranks wants it: summed over replicas, over the ranks."""
        total, group = gradient / self._comm.size, self._groups[self._specs[name].reduce_over]
        if group.size > 1:
            reduce_flat([total], self._comm, group)
        return total

    def sync_gradients(self, gradients: Any = None) -> None:
        """Nothing is left to do: hooks did it during backward."""

    def original(self) -> nn.Module:
        """Their module again, with the experts of all ranks. Collective."""
        (module,) = self._original
        for attribute, value in self.whole().items():
            setattr(module, attribute, nn.Parameter(value))
        return module

    def whole(self) -> dict[str, Tensor]:
        """The parameters that their module had, with the experts of all ranks. Collective."""
        stacks = {name: self._whole(name) for name in self.named()}
        found: dict[str, Tensor] = {}
        for ours, there in (("up", "gate_up_proj"), ("down", "down_proj")):
            weight = stacks[f"w_{ours}"]
            if not self._woven:
                found[there] = weight.transpose(1, 2).contiguous()
                continue
            for key, value in ((there, weight), (f"{there}_bias", stacks[f"b_{ours}"])):
                found[key] = _woven(value) if ours == "up" else value
        return found

    def state_dict_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters()]

    @torch.no_grad()
    def _whole(self, name: str) -> Tensor:
        """A stack of all experts: every rank puts in what it has, and they are added up."""
        spec, value = self._specs[name], self.named()[name]
        shape = spec.pieces[0].shape
        count = self._original[0].num_experts
        whole = value.new_zeros((count, prod(shape)))
        for piece, row in zip(spec.pieces, value):
            part = row.reshape(-1)
            stop = part.shape[0] + piece.start if piece.stop is None else piece.stop
            target = whole[_expert_of(piece.name), piece.start : min(stop, whole.shape[1])]
            target.copy_(part[: target.shape[0]])
        if spec.norm_over is not None and self._groups[spec.norm_over].size > 1:
            reduce_flat([whole], self._comm, self._groups[spec.norm_over])
        return whole.reshape(count, *shape)


def _refuse_part(module: nn.Module, *_: Any) -> None:
    if isinstance(module, ExpertsModule) and not module.gathering:
        raise RuntimeError(
            "the state of one rank is not the model: its experts are spread over ranks; save with a Trainer derived "
            "from ExpertClipping, or call twinmoe.moe_core.restore_moe_blocks(model) on all ranks first"
        )


def _expert_of(name: str) -> int:
    """Of experts.3.w_up: 3."""
    return int(name.split(".")[-2])


def _woven(value: Tensor) -> Tensor:
    half = value.shape[-1] // 2
    return torch.stack([value[..., :half], value[..., half:]], -1).flatten(-2)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a sub-module by its dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def swap(model: nn.Module, block: Block, component: Component, groups: Mapping[str, Group], comm: Communicator) -> None:
    """Put ours in the place of a block; its weights are read by the component's parameters and then let go."""
    put(model, block.name, ExpertsModule(component, groups, comm, block))


def exclude(model: nn.Module) -> None:
    """Before DistributedDataParallel wraps the model: leave expert parameters to the hooks."""
    TorchLayerModule.exclude_experts(model)


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What `state_dict` of the unmodified model would be. Collective."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, ExpertsModule)}
    for module in blocks.values():
        module.gathering = True
    try:
        found = model.state_dict()
    finally:
        for module in blocks.values():
            module.gathering = False
    for name, module in blocks.items():
        for attribute in module.state_dict_names():
            del found[f"{name}.{attribute}"]
        found |= {f"{name}.{attribute}": value for attribute, value in module.whole().items()}
    return found


def restore(model: nn.Module) -> None:
    """Put all modules back as they were, with the weights of now, for save_pretrained. Collective."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ExpertsModule):
            put(model, name, module.original())
    model._ddp_params_and_buffers_to_ignore = []  # type: ignore[assignment]


class ExpertClipping:
    """First base of a Trainer: `class MyTrainer(ExpertClipping, Trainer)`. Norms count every parameter once, over all
    ranks; saved models are whole, and load without twinmoe.

    Elsewhere: `clip_gradients(model, max_norm)` instead of `accelerator.clip_grad_norm_`.
    """

    accelerator: Any
    args: Any
    model: Any

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        self.accelerator.unscale_gradients()
        return clip_gradients(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        return clip_gradients(model, float("inf")) if grad_norm is None else grad_norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        whole = whole_state_dict(self.model) if state_dict is None else state_dict
        super()._save(output_dir, state_dict=whole)  # type: ignore[misc]

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(
            "the optimizer's state of the experts is not in a Trainer's checkpoint; start again from its weights: "
            "from_pretrained, then replace_moe_blocks (twinmoe's own loop resumes with everything)"
        )


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """The norm of all gradients, each parameter counted once over all ranks; clips as torch does. Collective."""
    layer = next((m for m in model.modules() if isinstance(m, TorchLayerModule)), None)
    if layer is None:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = torch.tensor(layer.clip_grad_norm(model, float("inf")), dtype=torch.float64)
    clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def refuse_wrong_clipping() -> None:
    """RuntimeError if the Trainer that is training clips by the norm of one rank's parameters.

    A Trainer tells its model nothing of itself: it is looked for among the callers, once.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        frame = frame.f_back
        limit = getattr(getattr(owner, "args", None), "max_grad_norm", None)
        if limit is None or not hasattr(owner, "training_step"):
            continue
        if limit > 0 and not isinstance(owner, ExpertClipping):
            raise RuntimeError(
                f"{type(owner).__name__} with max_grad_norm={limit} would clip by the norm of one rank's experts; "
                "derive class MyTrainer(ExpertClipping, Trainer), from twinmoe.backends.torch_shared.blocks, or set "
                "max_grad_norm=0"
            )
        if isinstance(owner, ExpertClipping) and not hasattr(super(ExpertClipping, owner), "_clip_grad_norm"):
            raise RuntimeError(
                f"{type(owner).__name__} does not clip where this version of twinmoe expects it; use transformers 5"
            )
        return
