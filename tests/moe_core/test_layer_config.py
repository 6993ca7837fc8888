"""A layer's config is refused in one sentence where an experiment's is, or where only a loop could honour it."""

from __future__ import annotations

from typing import Any

import pytest
from twinmoe.moe_core import ConfigError, Mesh, MoeConfig, ParallelConfig, build_moe_layer
from twinmoe.moe_core.layer_config import layer_config, layer_mesh
from twinmoe.testing.conftest import load_or_skip

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"top_k": 1}, {}, "set moe.norm_topk_prob=false"),
    ({"num_groups": 3}, {}, "choose a num_groups that divides num_experts"),
    ({"shared_expert_gate": True}, {}, "there is no shared expert to gate"),
    ({"router": "switch"}, {}, "set moe.top_k=1"),
    ({"num_heads": 2}, {}, "set moe.head_dim"),
    ({"router": "nope"}, {}, "is unknown; choose one of"),
    ({"num_expert": 4}, {}, "did you mean moe.num_experts"),
    ({"num_experts": 0}, {}, "moe.num_experts=0 is not accepted"),
    ({"top_k": 9}, {}, "choose top_k <= num_experts"),
    ({"activation": "relu"}, {}, "moe.activation='relu' is not accepted"),
    ({"capacity_factor": 0}, {}, "drops everything"),
    ({"router_jitter": 0.1}, {}, "moe.router_jitter=0.1 is for twinmoe's own training loop"),
    ({"bias_update_rate": 0.1}, {}, "moe.bias_update_rate=0.1 is for twinmoe's own"),
    ({"nan_policy": "raise"}, {}, "nan_tokens"),
    ({"capacity_rule": "angle_step"}, {}, "set it to factor"),
    ({"aux_loss_layers": "concatenated"}, {}, "set it to separate"),
    ({}, {"planner": "relayout"}, "choose residency borrowed or fully_sharded"),
    ({}, {"nope": 1}, "unknown key parallel.nope"),
    ({}, {"scheme": "nope"}, "nope"),
    ({}, {"scheme": "auto"}, "name one"),
    ({}, {"data_sharding": "full"}, "wrap your model in FSDP2"),
    ({}, {"data_assignment": "by_domain"}, "set it to round_robin"),
    ({}, {"scheme": "laer", "prefetch_layers": 1}, "the model knows which layer comes next"),
    ({}, {"placement": "swap"}, "set it to fixed"),
    ({"expert_hidden_size": 9}, {"tensor_parallel_size": 2}, "choose a tensor_parallel_size that divides"),
    ({}, {"expert_parallel_size": 4}, "does not divide 1 ranks"),
    ({}, {"tensor_parallel_size": 2}, "does not divide 1 ranks"),
]


@pytest.mark.parametrize(("moe", "parallel", "said"), REFUSED)
def test_a_wrong_layer_is_refused_in_one_sentence(moe: dict[str, Any], parallel: dict[str, Any], said: str) -> None:
    home = load_or_skip("reference")
    with pytest.raises(ConfigError) as caught:
        build_moe_layer({"num_experts": 4, "top_k": 2, **moe}, parallel, backend=home, hidden_size=8)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("width", [0, -1, 1.5, True, "8"])
def test_a_width_is_a_positive_integer(width: Any) -> None:
    with pytest.raises(ConfigError, match="is not a width"):
        build_moe_layer({}, backend=load_or_skip("reference"), hidden_size=width)


@pytest.mark.parametrize("moe", [None, 3, [1]])
def test_a_section_holds_keys_and_values(moe: Any) -> None:
    with pytest.raises(ConfigError, match="moe must hold keys and values"):
        layer_config(moe, None, None)


def test_a_scheme_brings_its_axes() -> None:
    for parallel in ({"scheme": "llep"}, ParallelConfig(scheme="llep")):
        found = layer_config({}, parallel, None).parallel
        assert (found.planner, found.residency) == ("least_loaded", "borrowed")


def test_sections_that_were_read_already_stay_as_they_are() -> None:
    moe = MoeConfig(num_experts=6, capacity_factor="4/3", locality_nodes=2, locality_expert_nodes=(0, 1, 0, 1, 0, 1))
    parallel = ParallelConfig(planner="least_loaded", residency="borrowed", scheme="custom")
    found = layer_config(moe, parallel, None)
    assert (found.moe, found.parallel) == (moe, parallel)


def test_an_attention_that_the_layer_does_not_have_refuses_nothing() -> None:
    config = layer_config({"expert_hidden_size": 24}, {"tensor_parallel_size": 3}, None)
    assert layer_mesh(config, None, 3) == Mesh(tensor=3)


def test_the_mesh_is_as_the_config_says() -> None:
    assert layer_mesh(layer_config({}, None, None), None, 4) == Mesh(expert=4)
    assert layer_mesh(layer_config({}, {"expert_parallel_size": 2}, None), None, 4) == Mesh(data=2, expert=2)
    mesh = Mesh.over(4, expert=2, tensor=2)
    assert layer_mesh(layer_config({}, {"transport": "groupwise"}, mesh), mesh, 4) == mesh


def test_a_mesh_that_the_config_or_the_job_denies_is_refused() -> None:
    mesh = Mesh.over(4, expert=2)
    with pytest.raises(ConfigError, match=r"parallel\.expert_parallel_size=4, but the mesh has expert=2"):
        layer_mesh(layer_config({}, {"expert_parallel_size": 4}, mesh), mesh, 4)
    with pytest.raises(ConfigError, match="the mesh has 4 ranks and the job 2"):
        layer_mesh(layer_config({}, None, mesh), mesh, 2)
