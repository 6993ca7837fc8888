"""Somebody's training script: a small model of transformers in its own Trainer, on one process or several."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from twinmoe.backends.protocol import Launch
from twinmoe.backends.registry import Backend
from twinmoe.backends.torch_shared.blocks import ExpertClipping, clip_gradients
from twinmoe.moe_core import replace_moe_blocks, restore_moe_blocks
from twinmoe.testing.end_to_end.huggingface import make_theirs

STEPS, BATCH, LENGTH = 20, 4, 16


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random sequences, the same everywhere."""

    def __init__(self) -> None:
        self._rows = torch.from_numpy(np.random.default_rng(3).integers(0, 96, (STEPS * BATCH, LENGTH)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


class Watch(TrainerCallback):
    """Keeps what is logged, unrounded."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))


class OursTrainer(ExpertClipping, Trainer):
    """The remedy."""


def train(backend: Backend, launch: Launch, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One run of the script after the other; a run: the arguments of `_run`; parallel None: the model as
    it is."""
    place = {"RANK": launch.rank, "LOCAL_RANK": launch.rank, "WORLD_SIZE": launch.size}
    place |= {"MASTER_ADDR": launch.address, "MASTER_PORT": launch.port}
    if launch.size > 1:
        os.environ.update({name: str(value) for name, value in place.items()})
    return {"runs": [(_script if "script" in run else _run)(backend, launch, **run) for run in runs]}


def _script(
    backend: Backend, launch: Launch, model: str, parallel: dict[str, Any] | None, folder: str, script: str
) -> dict[str, Any]:
    """A loop over accelerate, two micro-batches a step."""
    accelerator: Any = Accelerator(cpu=True, gradient_accumulation_steps=2)
    theirs = make_theirs(model, output_router_logits=False, experts_implementation="eager").double()
    if parallel is not None:
        replace_moe_blocks(theirs, parallel, backend, launch)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3)
    loader = DataLoader(Rows(), batch_size=BATCH // launch.size)
    theirs, optimizer, loader = accelerator.prepare(theirs, optimizer, loader)
    losses, norms = [], []
    for batch in islice(loader, 10):
        with accelerator.accumulate(theirs):
            loss = theirs(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and parallel is None:
                norms.append(float(accelerator.clip_grad_norm_(theirs.parameters(), 0.1)))
            elif accelerator.sync_gradients:
                norms.append(float(clip_gradients(theirs, 0.1)))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return {"loss": losses, "grad_norm": norms, "script": script}


def _run(
    backend: Backend,
    launch: Launch,
    model: str,
    parallel: dict[str, Any] | None,
    folder: str,
    stock: bool = False,
    recompute: bool = False,
) -> dict[str, Any]:
    words: dict[str, Any] = dict(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // launch.size,
        max_grad_norm=0.1,
        learning_rate=3e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=recompute,
        ddp_backend="gloo" if launch.size > 1 else None,
    )
    args = TrainingArguments(**words)
    theirs = make_theirs(model, output_router_logits=False, experts_implementation="eager").double()
    swapped = 0 if parallel is None else replace_moe_blocks(theirs, parallel, backend, launch)
    watch = Watch()
    kind = Trainer if stock or parallel is None else OursTrainer
    trainer = kind(model=theirs, args=args, train_dataset=Rows(), callbacks=[watch])
    try:
        trainer.train()
    except RuntimeError as error:
        if not stock:
            raise
        return {"error": str(error)}
    if parallel is not None:
        trainer.save_model(f"{folder}/saved")
        restore_moe_blocks(theirs, backend)
    sums = {name: float(p.detach().double().abs().sum()) for name, p in theirs.named_parameters()}
    if launch.size > 1:
        dist.barrier()
        saved: Any = AutoModelForCausalLM.from_pretrained(f"{folder}/saved", dtype=torch.float64)
        differs = [n for n, p in saved.named_parameters() if not torch.equal(p, theirs.get_parameter(n))]
        return {"swapped": swapped, "differs": differs, **_logs(watch), "sums": sums}
    return {"swapped": swapped, **_logs(watch), "sums": sums}


def _logs(watch: Watch) -> dict[str, list[float]]:
    return {key: [row[key] for row in watch.logs] for key in ("loss", "grad_norm")}
