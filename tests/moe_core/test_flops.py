"""Operations of a token against the sum by hand."""

from __future__ import annotations

import pytest
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.flops import peak_of, training_flops


def test_a_small_model_by_hand() -> None:
    config = load_config(
        {},
        [
            "model.vocab_size=10",
            "model.hidden_size=8",
            "model.num_layers=1",
            "model.num_attention_heads=2",
            "moe.num_experts=4",
            "moe.top_k=2",
            "moe.expert_hidden_size=6",
            "train.sequence_length=32",
        ],
    )
    attention, router, experts, head = 4 * 8 * 8, 8 * 4, 2 * 3 * 8 * 6, 8 * 10
    scores = 4 * 16 * 2 * 4
    assert training_flops(config) == 3 * (2 * (attention + router + experts + head) + scores)


def test_mixtral_is_six_times_its_active_parameters_and_attention() -> None:
    config = load_config("mixtral-8x7b")
    active = 12.88e9 - 32000 * 4096  # the embedding is looked up
    scores = 3 * 4 * config.train.sequence_length / 2 * 32 * 4096
    assert training_flops(config) == pytest.approx(6 * active + scores, rel=2e-3)


def test_peaks_are_known_by_a_part_of_the_name() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_of("NVIDIA H100 PCIe") is None
    assert peak_of("torch runs on every host") is None
