"""The Hugging Face models that are converted, and how each calls things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .combinations import ConfigError


@dataclass(frozen=True)
class Family:
    """One model_type. moe, router, matrices: words in its tensors' names; stacked: all experts in one tensor, bias
    beside, columns of gate and up alternating. experts, hidden: keys of its config. fixed: our settings that all its
    models share."""

    model_type: str
    architecture: str
    fixed: Mapping[str, Any]
    experts: str = "num_experts"
    hidden: str = "moe_intermediate_size"
    moe: str = "mlp."
    router: str = "gate"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked: bool = False


FAMILIES: Mapping[str, Family] = {
    f.model_type: f
    for f in (
        Family(
            "mixtral",
            "MixtralForCausalLM",
            {"moe.norm_topk_prob": True},
            experts="num_local_experts",
            hidden="intermediate_size",
            moe="block_sparse_moe.",
            matrices=("w1", "w3", "w2"),
        ),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", {"moe.num_shared_experts": 1, "moe.shared_expert_gate": True}),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", {"model.qk_norm": True}),
        Family("olmoe", "OlmoeForCausalLM", {"model.qk_norm": "whole"}, hidden="intermediate_size"),
        Family(
            "gpt_oss",
            "GptOssForCausalLM",
            {
                "model.attention_sinks": True,
                "moe.activation": "swiglu_clamped",
                "moe.softmax_order": "after_topk",
                "moe.expert_bias": True,
                "moe.router_bias": True,
            },
            experts="num_local_experts",
            hidden="intermediate_size",
            router="router",
            stacked=True,
        ),
    )
}

_MLA = "its attention is MLA (multi-head latent attention), which twinmoe does not have"
REFUSED: Mapping[str, str] = {
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "kimi_k2": _MLA,
    "glm4_moe_lite": _MLA,
}


def family_of(about: Mapping[str, Any]) -> Family:
    """The family of a config.json. ConfigError names those that are not converted, and why."""
    kind = str(about.get("model_type"))
    if kind in FAMILIES:
        return FAMILIES[kind]
    why = REFUSED.get(kind, "nobody has written down which of its tensors is which")
    raise ConfigError(f"model_type {kind} is not converted: {why}; choose one of {', '.join(FAMILIES)}")
