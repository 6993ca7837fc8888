"""Sizes of published models, without allocating them."""

from __future__ import annotations

import resource

import pytest
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.shapes import shapes

PUBLISHED = {
    "mixtral-8x7b": (46.7e9, 12.9e9),
    "qwen3-30b-a3b": (30.5e9, 3.3e9),
    "olmoe-1b-7b": (6.9e9, 1.3e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    """To three digits of the total; active counts are published to two."""
    total, active = PUBLISHED[name]
    found = shapes(load_config(name))
    assert found.parameters_total == pytest.approx(total, abs=0.05e9)
    assert found.parameters_active == pytest.approx(active, abs=0.06e9)


def test_layer_shapes_are_those_published() -> None:
    """gpt-oss-120b 117B; DeepSeek-V3's experts are 58 x 257 of three 7168 x 2048 matrices; PanGu-Sigma 1.085T."""
    assert shapes(load_config("gpt-oss-120b")).parameters_total == pytest.approx(117e9, abs=0.5e9)
    assert shapes(load_config("pangu-sigma")).parameters_total == pytest.approx(1.085e12, abs=0.5e9)
    deepseek = load_config("deepseek-v3")
    without = load_config("deepseek-v3", ["model.num_dense_layers=61"])
    dense_mlp = 3 * 7168 * 18432
    router = 7168 * 256
    per_layer = (shapes(deepseek).parameters_total - shapes(without).parameters_total) / 58
    assert per_layer == 257 * 3 * 7168 * 2048 + router - dense_mlp


def test_nothing_is_allocated() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shapes(load_config("pangu-sigma"), 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024, "kilobytes"


def test_bytes_by_hand() -> None:
    """4 layers, 4 x 256 tokens a rank, top-2, width 128, float32; 3/4 of the rows leave; 4 moves a step."""
    found = shapes(load_config("quickstart"), 4)
    assert found.bytes_per_step.dispatch_and_combine == 4 * (4 * 256) * 2 * 128 * 4 * 3 // 4 * 4
    recomputed = shapes(load_config("quickstart", ["train.recompute=layer"]), 4)
    assert recomputed.bytes_per_step.dispatch_and_combine == found.bytes_per_step.dispatch_and_combine * 6 // 4
    assert recomputed.memory_per_rank.activations < found.memory_per_rank.activations
    assert shapes(load_config("quickstart"), 1).bytes_per_step.total == 0


def test_weights_of_sharded_experts_by_hand() -> None:
    """fsdp_ep: two slots a rank, 4 layers, forward and backward; laer has a spare slot; ep moves no weights."""
    expert = 3 * 128 * 256 * 4
    fixed = shapes(load_config("quickstart", ["parallel.scheme=fsdp_ep"]), 4).bytes_per_step
    assert fixed.weights == 4 * 2 * 2 * expert * 3 // 4
    assert (
        shapes(load_config("quickstart", ["parallel.scheme=laer"]), 4).bytes_per_step.weights == fixed.weights * 3 // 2
    )
    micro = shapes(load_config("quickstart", ["parallel.scheme=fsdp_ep", "train.micro_batch_size=2"]), 4)
    assert micro.bytes_per_step.weights == 2 * fixed.weights
    assert shapes(load_config("quickstart"), 4).bytes_per_step.weights == 0


def test_memory_by_hand() -> None:
    """Two experts of eight on each of four ranks; AdamW holds two moments; bf16 adds a copy to compute with."""
    whole, quarter = shapes(load_config("quickstart")), shapes(load_config("quickstart"), 4)
    experts = 4 * 8 * 3 * 128 * 256
    stored = whole.parameters_total - experts + experts // 4
    memory = quarter.memory_per_rank
    assert memory.parameters == memory.gradients == 4 * stored
    assert memory.optimizer == 8 * stored
    halved = shapes(load_config("quickstart", ["train.dtype=bfloat16"]), 4).memory_per_rank
    assert halved.parameters == 6 * stored
    assert halved.activations < memory.activations


def test_buffers_of_hccl_count_as_memory() -> None:
    """Four ranks, one group of them all and the job's own: 2 communicators x 2 buffers x 200 MB."""
    plain, found = (shapes(load_config("quickstart"), 4, backend) for backend in ("reference", "ascend"))
    assert plain.memory_per_rank.communicators == 0
    assert found.memory_per_rank.communicators == 2 * 2 * 200 * 2**20
    assert found.memory_per_rank.total - plain.memory_per_rank.total == 800 * 2**20
    assert "communicators 839 MB" in found.lines()[2]
    assert shapes(load_config("quickstart"), 1, "ascend").memory_per_rank.communicators == 0


def test_groups_of_a_hierarchy_have_buffers_too() -> None:
    """Two nodes of four: the whole, the node and the rails, beside the job's own."""
    cluster = "cluster={name: two, levels: [{name: node, size: 4}, {name: all, size: null}]}"
    config = load_config("quickstart", ["parallel.transport=hierarchical_dedup", cluster])
    assert shapes(config, 8, "ascend").memory_per_rank.communicators == 4 * 400 * 2**20


def test_active_share_of_experts() -> None:
    found = shapes(load_config("quickstart"))
    experts = 4 * 8 * 3 * 128 * 256
    assert found.parameters_total - found.parameters_active == experts * 6 // 8


def test_lines_for_people() -> None:
    lines = shapes(load_config("mixtral-8x7b"), 8).lines()
    assert lines[0] == "parameters 46.7 G, 12.9 G of them active for a token"
    assert "expert 8" in lines[1]
