"""The trainer of both torch backends: what an optimizer's lists of parameters hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends.protocol import Component, Group, Launch, Parameter, TrainOptions
from twinmoe.testing.processes import run_processes


def step_over_lists(backend: Any, launch: Launch) -> dict[str, Any]:
    """One step of AdamW over lists of tensors, as torch takes it on GPUs, where dense parameters are sharded."""
    comm = backend.comm.connect(launch)
    groups = {"world": comm.group("world", [[0, 1]]), "self": Group("self", (comm.rank,), 0)}

    def ones() -> np.ndarray:
        return np.ones((4, 2))

    dense = Parameter("dense", (4, 2), ones)
    expert = Parameter("expert", (4, 2), ones, reduce_over="self", norm_over="world")

    def forward(params: Any) -> Any:
        return (params["dense"] * params["expert"]).sum()

    component = Component("toy", (dense, expert), forward)
    options = TrainOptions(dtype="float64", data_sharding="full")
    state = backend.trainer.build([component], options, groups, comm)
    for group in state.optimizer.param_groups:
        group["foreach"] = True
    loss, _ = backend.trainer.accumulate(state, lambda: (state.modules["toy"](), None))
    backend.trainer.reduce_gradients(state)
    norm = backend.trainer.clip_gradients(state, None)
    backend.trainer.step(state, 0.1)
    values = {name: value.tolist() for name, kind, value in backend.trainer.tensors(state) if kind == "parameter"}
    comm.close()
    return {"loss": float(loss), "norm": norm, "values": values, "groups": len(state.optimizer.param_groups)}


@pytest.mark.processes
def test_a_step_over_lists_of_tensors_takes_sharded_and_whole_parameters() -> None:
    """dense: gradient 2 (two ranks), expert: 1 on each of two ranks; norm sqrt(8 * 4 + 2 * 8 * 1)."""
    found = run_processes(2, "twinmoe.testing.backends.torch_shared.test_trainer:step_over_lists", {}, "cpu", 60)
    assert found["loss"] == 8.0
    assert found["norm"] == pytest.approx(48**0.5)
    decayed_then_moved = 1 - 0.1 * TrainOptions().weight_decay - 0.1
    for value in found["values"].values():
        np.testing.assert_allclose(value, decayed_then_moved, rtol=1e-6)
