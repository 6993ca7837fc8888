"""The algorithms. Read in this order: layer.py, plan.py, config.py, then the folder whose question you have.

Shape suffixes: T tokens on a rank, D width, K experts per token, E experts, R ranks, C slots, H heads,
F expert width, N rows after dispatch, S sequences, L their length.
"""

from __future__ import annotations

if __name__ == "moe_core":
    raise ImportError("import twinmoe.moe_core; the folder moe_core is a part of the package twinmoe")

from importlib.metadata import version as _version

from .combinations import ConfigError
from .compose import load_config
from .config import Config, MoeConfig, ParallelConfig
from .hf_blocks import replace_moe_blocks, restore_moe_blocks
from .interop import (
    build_moe_layer,
    clip_grad_norm,
    exclude_experts,
    expert_parameters,
    layer_state_dict,
    sync_gradients,
)
from .layer import MoEOutput
from .mesh import Mesh
from .routing import register_router

__version__ = _version("twinmoe")

__all__ = [
    "Config",
    "ConfigError",
    "Mesh",
    "MoEOutput",
    "MoeConfig",
    "ParallelConfig",
    "__version__",
    "build_moe_layer",
    "clip_grad_norm",
    "exclude_experts",
    "expert_parameters",
    "layer_state_dict",
    "load_config",
    "register_router",
    "replace_moe_blocks",
    "restore_moe_blocks",
    "sync_gradients",
]
