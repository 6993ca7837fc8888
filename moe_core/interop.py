"""An MoE layer for other people's models and loops (`nn.Module` under torch, `nn.Cell` under MindSpore).

There the loss of a rank is a mean over its own tokens and replicated gradients are averaged over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..backends.protocol import Array, Component, Launch, LayerModule, Ops
from ..backends.registry import Backend, load, read_launch
from .build import LayerSpec, build_layer, make_runtime
from .config import ClusterConfig, MoeConfig, ParallelConfig
from .layer import MoEOutput
from .layer_config import check_width, layer_config, layer_mesh
from .mesh import Mesh
from .routing.base import Memo, Tokens
from .topology import cluster_of_launch
from .transformer import scoped


def build_moe_layer(
    moe: MoeConfig | Mapping[str, Any],
    parallel: ParallelConfig | Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    backend: Backend | str | None = None,
    *,
    hidden_size: int,
    launch: Launch | None = None,
    name: str = "moe",
    seed: int = 0,
    as_tensor: bool = False,
) -> Any:
    """One MoE layer as the framework's module: forward(x of (..., hidden_size), real=None) -> MoEOutput.

    x: (T, D), or (S, L, D) where each of the S sequences has its own balance loss; real: boolean, False on
    padding. y has the shape of x; losses are means over this rank's tokens, before coefficients. as_tensor: only y.
    moe, parallel: sections of a config, with the same schemes and rules. mesh: data x expert (x tensor) ranks; None:
    as `parallel` says (expert_parallel_size auto: the most ranks that the experts allow). A process group that exists
    is used; launch: who this process is (None: as the launcher's variables say). No token that is not finite raises:
    out.stats.statistics['nan_tokens'] counts them. ConfigError in one sentence for what can't be built.
    """
    check_width(hidden_size)
    config = layer_config(moe, parallel, mesh)
    home = backend if isinstance(backend, Backend) else load(backend)
    launch = launch or read_launch()
    comm = home.comm.connect(launch)
    cluster = cluster_of_launch(launch, ClusterConfig())
    runtime = make_runtime(home.ops, comm, layer_mesh(config, mesh, comm.size), config.parallel, cluster)
    prefix = f"{name}."
    parts = build_layer(config.moe, config.parallel, runtime, LayerSpec(hidden_size, prefix, seed))

    def forward(params: Mapping[str, Array], x: Array, real: Array | None = None) -> MoEOutput | Array:
        _check_input(home.ops, x, real, hidden_size)
        x_TD = x.reshape((-1, hidden_size))
        real_T = None if real is None else real.reshape((-1,))
        total = x_TD.shape[0] if real_T is None else int(home.ops.to_numpy(real_T).sum())
        tokens = Tokens(sequences=x.shape[0] if len(x.shape) == 3 else 1, total=float(max(total, 1)), real_T=real_T)
        out = parts.layer(scoped(params, prefix), x_TD, tokens, Memo())
        y = out.y.reshape(x.shape)
        return y if as_tensor else MoEOutput(y, out.losses, out.stats)

    return home.trainer.module(Component(name, parts.parameters, forward), runtime.groups, comm)


def _check_input(ops: Ops, x: Array, real: Array | None, hidden_size: int) -> None:
    """ValueError or TypeError for tokens of another width or no floats, and masks that are not of these tokens."""
    try:
        ops.dtype_of(x)
    except (KeyError, AttributeError, TypeError):
        raise TypeError(
            f"x is a {type(x).__name__} of {_dtype(x)}; pass a floating tensor of the layer's framework"
        ) from None
    shape = tuple(x.shape)
    if not shape or shape[-1] != hidden_size:
        raise ValueError(f"x of shape {shape} does not end with hidden_size={hidden_size}; pass (..., {hidden_size})")
    if real is None:
        return
    if not _dtype(real).lower().endswith("bool"):
        raise TypeError(f"real is of {_dtype(real)}; pass a boolean mask, True for real tokens (for example mask != 0)")
    rows = tuple(real.shape)
    if rows != shape[:-1] and rows != (math.prod(shape[:-1]),):
        raise ValueError(f"real of shape {rows} does not say which tokens of x {shape} are real; pass {shape[:-1]}")


def _dtype(x: Array) -> str:
    return str(getattr(x, "dtype", None) or getattr(getattr(x, "value", x), "dtype", "no dtype"))


def expert_parameters(layer: LayerModule) -> list[Any]:
    """Parameters that differ between ranks: keep them out of DDP, pass them to FSDP2 as `ignored_params`."""
    return layer.expert_parameters()


def sync_gradients(layer: LayerModule, gradients: Any = None) -> Any:
    """After backward: expert gradients become those of the mean over ranks (MindSpore: passed and returned).

    Frozen parameters get none; freeze the same ones on every rank.
    """
    return layer.sync_gradients(gradients)


def clip_grad_norm(layer: LayerModule, model: Any, max_norm: float, gradients: Any = None) -> Any:
    """Clip all gradients of `model`, counting each parameter once over all ranks; returns the norm."""
    return layer.clip_grad_norm(model, max_norm, gradients)


def exclude_experts(layer: LayerModule, model: Any) -> None:
    """Before DistributedDataParallel wraps `model`: leave expert parameters to `sync_gradients`."""
    layer.exclude_experts(model)


def layer_state_dict(layer: LayerModule) -> dict[str, np.ndarray]:
    """This rank's parameters by logical name."""
    return layer.layer_state_dict()
