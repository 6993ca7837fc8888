"""Every router in a whole model: losses and gradients do not depend on ranks, micro-batches or recomputation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends.protocol import TrainOptions
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.backends.registry import load
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.data import GlobalBatch
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.model import build_model
from twinmoe.moe_core.routing import router_names

SEQUENCES, LENGTH, VOCABULARY = 4, 6, 11
MOE = {
    "num_experts": 4, "top_k": 2, "expert_hidden_size": 6, "num_groups": 2, "group_top_k": 2, "inner_router": "topk",
    "score_scale": "sqrt", "aux_loss_coeff": 0.1, "z_loss_coeff": 0.01, "entropy_loss_coeff": 0.05,
    "locality_loss_coeff": 0.2, "locality_nodes": 2, "locality_scope": "sequence", "capacity_factor": "1.25",
    "router_jitter": 0.1, "bias_update_rate": 0.01,
}  # fmt: skip
ROUTERS = [name for name in router_names() if name != "nearest"]


def config(recompute: str = "none", **moe: Any) -> Config:
    model = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_layers": 2, "num_attention_heads": 2, "init_std": 0.5}
    train = {
        "global_batch_size": SEQUENCES, "sequence_length": LENGTH, "steps": 1, "dtype": "float64",
        "recompute": recompute,
    }  # fmt: skip
    return Config.model_validate({"model": model, "moe": {**MOE, **moe}, "train": train})


def batch() -> GlobalBatch:
    """The last sequence ends in padding."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, VOCABULARY, (2, SEQUENCES, LENGTH))
    real = np.ones(tokens.shape, bool)
    real[3, 4:] = False
    targets[~real] = -1
    documents = np.where(real, 0, 1)
    return GlobalBatch(
        tokens, targets, real, documents, np.arange(4), np.arange(4) % 2, int(real.sum()), int(real.sum())
    )


def trained(settings: Config, ranks: int, micro: int | None = None) -> tuple[float, dict[str, np.ndarray], list[Any]]:
    """(loss of the step, gradients of the replicated parameters and all experts, statistics by layer)."""
    backend = load("reference")

    def body(comm: Any) -> Any:
        runtime = make_runtime(backend.ops, comm, Mesh.over(ranks, expert=ranks))
        model = build_model(settings, runtime)
        state = backend.trainer.build(model.components, TrainOptions(dtype="float64"), runtime.groups, comm)
        states = model.initial_router_states()
        for layer in states.values():
            if "bias" in layer:
                layer["bias"] = np.array([0.3, -0.2, 0.1, -0.2])
        loss, seen = 0.0, []
        for part in batch().for_rank(comm.rank, ranks).micro_batches(micro):
            value, out = backend.trainer.accumulate(
                state, lambda part=part: model.loss(state.modules, part, 3, router_states=states)
            )
            loss += float(backend.ops.to_numpy(value))
            seen.append([{n: backend.ops.to_numpy(v) for n, v in s.statistics.items()} for s in out.stats])
        backend.trainer.reduce_gradients(state)
        return loss, backend.trainer.gradients(state), seen

    found = run_ranks(ranks, body)
    grads = {
        name: np.concatenate([f[1][name] for f in found]) if "moe.w_up" in name or "moe.w_down" in name else value
        for name, value in found[0][1].items()
    }
    parts = [micro_seen for f in found for micro_seen in f[2]]
    totals = [{n: sum(p[i][n] for p in parts) for n in parts[0][i]} for i in range(len(parts[0]))]
    return sum(f[0] for f in found), grads, totals


def assert_equal(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a[0], b[0], rtol=1e-12)
    assert a[1].keys() == b[1].keys()
    for name, value in a[1].items():
        np.testing.assert_allclose(b[1][name], value, atol=1e-12 * max(1.0, float(np.abs(value).max())), err_msg=name)
    for one, other in zip(a[2], b[2], strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


@pytest.mark.parametrize("router", ROUTERS)
def test_two_and_four_ranks_give_what_one_gives(router: str) -> None:
    whole = trained(config(router=router), 1)
    assert_equal(whole, trained(config(router=router), 2))
    assert_equal(whole, trained(config(router=router), 4))
    assert sum(layer["chosen_E"].sum() for layer in whole[2]) > 0


@pytest.mark.parametrize("router", ["topk", "switch", "expert_choice", "hash"])
def test_micro_batches_give_what_one_batch_gives(router: str) -> None:
    whole = trained(config(router=router), 1)
    assert_equal(whole, trained(config(router=router), 1, micro=2))
    assert_equal(whole, trained(config(router=router), 2, micro=1))


@pytest.mark.parametrize("recompute", ["experts", "layer"])
@pytest.mark.parametrize("router", ["topk", "grap", "hierarchical"])
def test_recomputation_replays_the_decisions(router: str, recompute: str) -> None:
    assert_equal(trained(config(router=router), 1), trained(config(recompute, router=router), 1))


@pytest.mark.parametrize("layers", ["separate", "concatenated"])
def test_pooled_losses_do_not_depend_on_ranks(layers: str) -> None:
    pooled = {"aux_loss_scope": "global", "aux_loss_layers": layers, "locality_scope": "node", "router": "topk"}
    assert_equal(trained(config(**pooled), 1), trained(config(**pooled), 4))


def test_recomputed_pooled_losses_meet_again_in_backward() -> None:
    pooled = {"aux_loss_scope": "global", "locality_scope": "node", "router": "topk"}
    assert_equal(trained(config(**pooled), 2), trained(config("layer", **pooled), 2))


def test_losses_enter_with_their_coefficients() -> None:
    plain = trained(config(router="topk"), 1)[0]
    off = {"aux_loss_coeff": 0.0, "z_loss_coeff": 0.0, "entropy_loss_coeff": 0.0, "locality_loss_coeff": 0.0}
    cross_entropy = trained(config(**{"router": "topk", **off}), 1)[0]
    later = trained(config(router="topk", locality_start_step=4), 1)[0]
    without = trained(config(router="topk", locality_loss_coeff=0.0), 1)[0]
    assert plain > without > cross_entropy
    assert later == pytest.approx(without, rel=1e-14)
