"""The ranks of `eight_gpus.py`'s table on Head Parallel: the same layer shared by heads, by experts, and not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from twinmoe.backends.protocol import Communicator, Launch
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.build import LayerSpec, build_layer, make_runtime
from twinmoe.moe_core.config import ClusterConfig, LevelConfig, MoeConfig, ParallelConfig
from twinmoe.moe_core.heads_traffic import Layer, deduplicated, flat, head_parallel
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.routing.base import Memo, Tokens
from twinmoe.moe_core.transformer import scoped
from twinmoe.testing.bench.eight_gpus import timed


@dataclass(frozen=True)
class Way:
    """heads: the multi-head layer, else a plain one of equal parameters; over: how ranks share it."""

    name: str
    heads: bool
    over: str | None
    transport: str = "flat"
    bytes_sent: Callable[[Layer], float] = lambda layer: 0.0


WAYS = (
    Way("hp", True, "head", bytes_sent=head_parallel),
    Way("ep_of_heads", True, "expert", bytes_sent=flat),
    Way("ep", False, "expert", bytes_sent=flat),
    Way("ep_dedup", False, "expert", "hierarchical_dedup", bytes_sent=deduplicated),
    Way("hp_alone", True, None),
    Way("ep_alone", False, None),
)
"""`alone`: every rank computes its own tokens with all heads or experts: what remains without an exchange."""


def step_of(backend: Backend, comm: Communicator, way: Way, sizes: dict[str, Any], top_k: int) -> Callable[[], None]:
    """One forward and backward on this rank."""
    heads, width, ranks = sizes["heads"], sizes["width"], comm.size if way.over else 1
    moe = MoeConfig.model_validate({
        "num_experts": sizes["experts"], "top_k": top_k, "expert_hidden_size": sizes["hidden"], "aux_loss_coeff": 0.0,
        "z_loss_coeff": 0.0, "softmax_order": "after_topk",
        **({"num_heads": heads, "head_dim": width // heads} if way.heads else {}),
    })  # fmt: skip
    mesh = Mesh.over(comm.size, **{way.over or "expert": ranks})
    parallel = ParallelConfig.model_validate({"transport": way.transport})
    runtime = make_runtime(backend.ops, comm, mesh, parallel, ClusterConfig(levels=(LevelConfig(name="host"),)))
    parts = build_layer(moe, parallel, runtime, LayerSpec(width, "moe."))
    like = backend.ops.asarray(np.zeros(1, np.float32))
    low = {"bfloat16": torch.bfloat16, "float32": torch.float32}[sizes["dtype"]]

    def leaf(shape: tuple[int, ...], dtype: torch.dtype, std: float) -> torch.Tensor:
        return (torch.randn(shape, device=like.device) * std).to(dtype).requires_grad_()

    torch.manual_seed(comm.rank)
    leaves = {p.name: leaf(p.shape, torch.float32 if p.master else low, 0.02) for p in parts.parameters}
    x = leaf((sizes["tokens"], width), low, 1.0)
    tokens = Tokens(2, float(sizes["tokens"] * comm.size), global_sequences=2 * comm.size)
    inputs = [x, *leaves.values()]

    def step() -> None:
        y = parts.layer(scoped(leaves, "moe."), x, tokens, Memo()).y
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    return step


def rank(backend: Backend, launch: Launch, options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds and peak memory of each way and k; predicted gains from bytes at the measured rate of the link."""
    comm = backend.comm.connect(launch)
    group = comm.group("timing", [list(range(comm.size))])
    rows = [_row(backend, comm, group, options, k) for k in options["ks"]]
    comm.barrier()
    comm.close()
    return {"rows": rows}


def _row(backend: Backend, comm: Communicator, group: Any, options: dict[str, Any], top_k: int) -> dict[str, Any]:
    ms, found = {}, {"top_k": top_k}
    for way in WAYS:
        step = step_of(backend, comm, way, options, top_k)
        step()
        backend.trainer.peak_memory(reset=True)
        ms[way.name] = 1e3 * timed(backend, comm, group, step, options["repeats"])
        found |= {f"{way.name}_ms": ms[way.name], f"{way.name}_gib": backend.trainer.peak_memory() / 2**30}
        del step
    item = 2 if options["dtype"] == "bfloat16" else 4
    layer = Layer(options["tokens"], options["width"], comm.size, top_k, options["experts"], item)
    rate = _rate(backend, comm, group, layer)
    predicted = {w.name: ms["hp_alone" if w.heads else "ep_alone"] + 4e3 * w.bytes_sent(layer) / rate for w in WAYS[:4]}
    for other in ("ep_of_heads", "ep", "ep_dedup"):
        found |= {f"{other}_over_hp": ms[other] / ms["hp"], f"{other}_ceiling": predicted[other] / predicted["hp"]}
    return {**found, "link_gbs": rate / 1e9}


def _rate(backend: Backend, comm: Communicator, group: Any, layer: Layer) -> float:
    """Bytes a second that leave a rank in an all-to-all of its tokens."""
    like = backend.ops.asarray(np.zeros(1, np.float32))
    x = torch.randn(layer.ranks, layer.token_bytes // 4 // layer.ranks, device=like.device)
    return head_parallel(layer) / timed(backend, comm, group, lambda: comm.all_to_all(x, group), 5)
