"""What the tests of this folder run in several processes (`twinmoe.testing.processes`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from twinmoe.backends.protocol import Launch
from twinmoe.backends.registry import Backend
from twinmoe.moe_core import interop
from twinmoe.moe_core import train as training
from twinmoe.moe_core.config import Config

WIDTH, SEQUENCES, LENGTH = 16, 8, 6


def train(backend: Backend, launch: Launch, configs: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """Train one config after the other, each in a folder of its own below `folder`; their summaries."""
    summaries = []
    for number, config in enumerate(configs):
        run_dir = Path(folder) / str(number)
        run_dir.mkdir(exist_ok=True)
        here = replace(launch, port=launch.port + number)
        summaries.append(training.run(Config.model_validate(config), backend, here, run_dir))
    return {"summaries": summaries}


class Net(nn.Module):
    """Somebody's model with our layer inside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.moe, self.after = nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.moe(self.before(x))
        return self.after(out.y).pow(2).mean() + 0.01 * out.losses["load_balance"]


def their_loop(backend: Backend, launch: Launch, wrap: str, expert: int) -> dict[str, Any]:
    """Three AdamW steps of a loop that is not ours: wrap is 'none', 'ddp', 'raw_ddp' or 'fsdp'."""
    torch.set_default_dtype(torch.float64)
    if launch.size > 1:
        address = f"tcp://127.0.0.1:{launch.port}"
        dist.init_process_group("gloo", init_method=address, rank=launch.rank, world_size=launch.size)
    moe = {"num_experts": 8, "top_k": 2, "expert_hidden_size": 16}
    mesh = interop.Mesh.over(launch.size, expert=expert)
    layer = interop.build_moe_layer(moe, mesh=mesh, backend=backend, launch=launch, hidden_size=WIDTH)
    net = Net(layer)
    if wrap != "raw_ddp":
        interop.exclude_experts(layer, net)
    model: Any = nn.parallel.DistributedDataParallel(net) if "ddp" in wrap else net
    if wrap == "fsdp":
        fully_shard(net, ignored_params=set(interop.expert_parameters(layer)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    x = torch.randn(3, SEQUENCES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    share = SEQUENCES // launch.size
    losses, norms = [], []
    for step in range(3):
        try:
            loss = model(x[step, launch.rank * share : (launch.rank + 1) * share])
        except RuntimeError as error:
            if wrap != "raw_ddp":
                raise
            dist.barrier()
            return {"error": str(error)}
        loss.backward()
        interop.sync_gradients(layer)
        norms.append(interop.clip_grad_norm(layer, net, 0.01))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / launch.size
        if launch.size > 1:
            dist.all_reduce(mean)
        losses.append(float(mean))
    return {"losses": losses, "norms": norms, "names": sorted(interop.layer_state_dict(layer))}


def frozen_experts(backend: Backend, launch: Launch, expert: int) -> dict[str, Any]:
    """One AdamW step with strong decay while the up matrices are frozen: which parameters had a gradient, and moved."""
    moe = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 16}
    mesh = interop.Mesh.over(launch.size, expert=expert)
    layer = interop.build_moe_layer(moe, mesh=mesh, backend=backend, launch=launch, hidden_size=WIDTH)
    named = dict(layer.named_parameters())
    named["moe__w_up"].requires_grad_(False)
    before = {name: value.detach().clone() for name, value in named.items()}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=1.0)
    layer(torch.ones(SEQUENCES, WIDTH)).y.sum().backward()
    interop.sync_gradients(layer)
    norm = interop.clip_grad_norm(layer, layer, 1.0)
    optimizer.step()
    graded = {name: value.grad is not None for name, value in named.items()}
    return {"graded": graded, "moved": {n: bool((v != before[n]).any()) for n, v in named.items()}, "norm": norm}
