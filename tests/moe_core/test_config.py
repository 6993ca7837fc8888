"""A config can't be changed, hold an unknown key or a number out of range; its defaults are a whole experiment."""

from __future__ import annotations

from fractions import Fraction

import pytest
from pydantic import ValidationError
from twinmoe.moe_core.config import Config, LeastLoadedConfig, ModelConfig, MoeConfig, ParallelConfig, TrainConfig


def test_defaults_are_a_whole_experiment() -> None:
    config = Config()
    assert (config.moe.num_experts, config.moe.top_k, config.parallel.scheme) == (8, 2, "ep")
    assert config.moe.capacity_factor is None, "dropless unless asked"
    assert config.moe.capacity_group == "sequence"
    assert config.moe.aux_loss_scope == "sequence"
    assert config.parallel.max_rows_per_rank is None


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().moe.top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "fields", "told"),
    [
        (MoeConfig, {"top_k": 9, "num_experts": 8}, "top_k=9 exceeds moe.num_experts=8"),
        (MoeConfig, {"top_k": 0}, "greater than 0"),
        (MoeConfig, {"aux_loss_coeff": -1.0}, "greater than or equal to 0"),
        (MoeConfig, {"experts": 8}, "Extra inputs"),
        (ModelConfig, {"num_attention_heads": 4, "num_key_value_heads": 3}, "choose a divisor"),
        (ModelConfig, {"hidden_size": 30, "num_attention_heads": 4}, "set model.attention_head_dim"),
        (ParallelConfig, {"expert_parallel_size": 0}, "greater than 0"),
        (ParallelConfig, {"planner": "luck"}, "'static', 'least_loaded' or 'relayout'"),
        (TrainConfig, {"learning_rate": float("nan")}, "finite number"),
        (TrainConfig, {"max_grad_norm": 0.0}, "greater than 0"),
        (LeastLoadedConfig, {"alpha": "1/0"}, "a fraction such as 13/10"),
    ],
)
def test_impossible_values_are_refused(section: type, fields: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        section(**fields)


def test_ratios_that_all_ranks_compute_with_are_exact() -> None:
    assert LeastLoadedConfig.model_validate({"alpha": 1.3}).alpha == Fraction(13, 10)
    assert LeastLoadedConfig.model_validate({"alpha": "4/3"}).alpha == Fraction(4, 3)
