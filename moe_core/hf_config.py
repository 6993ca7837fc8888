"""config.json of Hugging Face to our sections `model` and `moe`, and back. What would be computed otherwise is refused.

Their balance loss pools the tokens of a batch and of all layers and sums over the top_k choices: it is ours with
`aux_loss_scope: global`, `aux_loss_layers: concatenated` and the coefficient times top_k. They add it only where
`output_router_logits` is set; ours is added wherever the coefficient is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from .combinations import ConfigError, check_combinations
from .config import Config
from .hf_families import FAMILIES, Family, family_of
from .keys import valid_keys

About = Mapping[str, Any]

TRAINING_ONLY = frozenset(
    [f"model.{key}" for key in ("init_std", "init_from", "layer_shape_only")]
    + [f"moe.{key}" for key in ("router_jitter", "router_dtype", "nan_policy", "z_loss_coeff", "entropy_loss_coeff")]
    + [key for key in valid_keys() if key.startswith(("moe.aux_loss_", "moe.locality_"))]
)
"""Settings that a model of theirs can't say and that do not change what a trained model computes."""

_SAME: Mapping[str, str] = {
    "model.vocab_size": "vocab_size",
    "model.hidden_size": "hidden_size",
    "model.num_layers": "num_hidden_layers",
    "model.num_attention_heads": "num_attention_heads",
    "model.norm_eps": "rms_norm_eps",
    "moe.top_k": "num_experts_per_tok",
}
_REFUSED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "clip_qkv": (None,),
    "attention_dropout": (0, 0.0),
    "router_jitter_noise": (0, 0.0),
    "decoder_sparse_step": (1,),
    "partial_rotary_factor": (1, 1.0, None),
}
"""Their keys -> values that ours computes."""


def to_sections(about: About) -> dict[str, dict[str, Any]]:
    """{'model': ..., 'moe': ...} of a config.json. ConfigError names what is missing or not computed here."""
    family = family_of(about)
    if about.get("quantization_config"):
        method = about["quantization_config"].get("quant_method", "quantised")
        raise ConfigError(
            f"the weights are {method}, which is not trained with; load them in bfloat16 with transformers "
            "(Mxfp4Config(dequantize=True) for gpt-oss) and save_pretrained"
        )
    for key, accepted in _REFUSED_VALUES.items():
        if key in about and about[key] not in accepted:
            raise ConfigError(f"{key}={about[key]!r} is not computed here; only {accepted[0]!r} is")
    flat = {ours: _need(about, theirs) for ours, theirs in _SAME.items()}
    flat |= family.fixed
    flat |= {
        "model.num_key_value_heads": about.get("num_key_value_heads"),
        "model.attention_head_dim": about.get("head_dim"),
        "model.tie_embeddings": bool(about.get("tie_word_embeddings", False)),
        "model.init_std": about.get("initializer_range", 0.02),
        "moe.num_experts": _experts(about, family),
        "moe.expert_hidden_size": _need(about, family.hidden),
        "moe.aux_loss_coeff": about.get("router_aux_loss_coef", 0.0) * about["num_experts_per_tok"],
        "moe.aux_loss_scope": "global",
        "moe.aux_loss_layers": "concatenated",
    }
    flat |= _rope(about) | _window(about, family) | _own(about, family)
    sections: dict[str, dict[str, Any]] = {"model": {}, "moe": {}}
    for dotted, value in flat.items():
        section, key = dotted.split(".")
        sections[section][key] = value
    return sections


def to_config(about: About, name: str = "converted") -> Config:
    """The sections as a validated Config."""
    try:
        config = Config.model_validate({"name": name, **to_sections(about)})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"config.json: {'.'.join(map(str, first['loc']))}: {first['msg']}; check the file") from None
    check_combinations(config)
    return config


def _need(about: About, key: str) -> Any:
    if about.get(key) is None:
        raise ConfigError(f"config.json lacks {key}; take the file that belongs to the weights")
    return about[key]


def _experts(about: About, family: Family) -> int:
    names = (family.experts, "num_experts", "num_local_experts")
    return next((about[n] for n in names if about.get(n) is not None), None) or _need(about, family.experts)


def _rope(about: About) -> dict[str, Any]:
    rope = dict(about.get("rope_parameters") or {})
    rope = rope or {"rope_theta": about.get("rope_theta"), **(about.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = _need(rope, "rope_theta")
    if kind == "default":
        return {"model.rope_theta": theta}
    if kind != "yarn" or rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ConfigError(f"rotary embedding {kind!r} of config.json is not computed here; default and yarn are")
    names = {"original_length": "original_max_position_embeddings"}
    names |= {n: n for n in ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor")}
    scaling = {ours: rope[theirs] for ours, theirs in names.items() if rope.get(theirs) is not None}
    return {"model.rope_theta": theta, "model.rope_scaling": scaling}


def _window(about: About, family: Family) -> dict[str, Any]:
    window, layers = about.get("sliding_window"), _need(about, "num_hidden_layers")
    if not window or about.get("use_sliding_window") is False:
        return {}
    kinds = about.get("layer_types")
    if kinds is None and family.model_type in ("qwen2_moe", "gpt_oss"):
        upto = about.get("max_window_layers", 28) if family.model_type == "qwen2_moe" else layers
        kinds = ["sliding_attention" if i % 2 == 0 and i < upto else "full_attention" for i in range(layers)]
    near = tuple(i for i, kind in enumerate(kinds or []) if kind == "sliding_attention")
    if kinds is not None and not near:
        return {}
    every = kinds is None or len(near) == layers
    return {"model.sliding_window": window, "model.sliding_layers": None if every else near}


def _own(about: About, family: Family) -> dict[str, Any]:
    """What only some families say."""
    kind = family.model_type
    found: dict[str, Any] = {}
    if kind == "qwen2_moe":
        found["model.attention_bias"] = about.get("qkv_bias", True)
        found["moe.shared_expert_hidden_size"] = _need(about, "shared_expert_intermediate_size")
    elif kind != "mixtral":
        bias = about.get("attention_bias", kind == "gpt_oss")
        found |= {"model.attention_bias": bias, "model.attention_output_bias": bias}
    if kind in ("qwen2_moe", "qwen3_moe", "olmoe"):
        found["moe.norm_topk_prob"] = about.get("norm_topk_prob", False)
    if kind in ("qwen2_moe", "qwen3_moe"):
        dense = about.get("mlp_only_layers") or []
        if sorted(dense) != list(range(len(dense))):
            raise ConfigError(f"mlp_only_layers={dense} are not the first layers, as dense layers are here")
        found["model.num_dense_layers"] = len(dense)
        found["model.dense_hidden_size"] = _need(about, "intermediate_size") if dense else None
    if kind == "gpt_oss":
        found["model.attention_head_dim"] = about.get("head_dim", 64)
        found["moe.swiglu_alpha"] = about.get("swiglu_alpha", 1.702)
        found["moe.swiglu_limit"] = about.get("swiglu_limit", 7.0)
    return found


def from_config(config: Config) -> tuple[Family, dict[str, Any]]:
    """(family, config.json) of a config. ConfigError names a setting that none of their models has."""
    complaints = []
    for family in FAMILIES.values():
        about = _written(config, family)
        try:
            unlike = differences(config, to_config(about))
        except ConfigError as error:
            complaints.append(f"{family.model_type}: {error}")
            continue
        if not unlike:
            return family, about
        complaints.append(f"{family.model_type}: {', '.join(unlike[:3])}")
    raise ConfigError(f"{config.name} is none of the models that transformers has ({'; '.join(complaints)})")


def differences(config: Config, other: Config) -> list[str]:
    """Settings of `model` and `moe` in which two configs compute unlike functions."""
    ours, theirs = (_effective(c) for c in (config, other))
    return [key for key in ours if key not in TRAINING_ONLY and ours[key] != theirs[key]]


def _effective(config: Config) -> dict[str, Any]:
    """Settings by name, those that stand for another's value filled in."""
    model, moe = config.model, config.moe
    flat = {f"model.{k}": v for k, v in model.model_dump().items()} | {
        f"moe.{k}": v for k, v in moe.model_dump().items()
    }
    flat["model.num_key_value_heads"] = model.num_key_value_heads or model.num_attention_heads
    flat["model.attention_head_dim"] = model.attention_head_dim or model.hidden_size // model.num_attention_heads
    if not model.num_dense_layers:
        flat["model.dense_hidden_size"] = None
    if not moe.num_shared_experts:
        flat["moe.shared_expert_hidden_size"] = None
    if moe.softmax_order == "after_topk":
        flat["moe.norm_topk_prob"] = True
    if moe.activation != "swiglu_clamped":
        flat["moe.swiglu_alpha"] = flat["moe.swiglu_limit"] = None
    return flat


def _written(config: Config, family: Family) -> dict[str, Any]:
    model, moe = config.model, config.moe
    about: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    sections = {"model": model, "moe": moe}
    for ours, theirs in _SAME.items():
        section, key = ours.split(".")
        about[theirs] = getattr(sections[section], key)
    about |= {
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
        "head_dim": model.attention_head_dim or model.hidden_size // model.num_attention_heads,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        family.experts: moe.num_experts,
        family.hidden: moe.expert_hidden_size,
        "router_aux_loss_coef": moe.aux_loss_coeff / moe.top_k,
        "max_position_embeddings": max(config.train.sequence_length, 4096),
        "rope_parameters": _written_rope(config),
        "sliding_window": model.sliding_window,
        "use_cache": True,
    }
    return about | _written_own(config, family)


def _written_rope(config: Config) -> dict[str, Any]:
    scaling = config.model.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.model.rope_theta}
    whole = scaling.model_dump()
    whole["original_max_position_embeddings"] = whole.pop("original_length")
    return {"rope_type": "yarn", "rope_theta": config.model.rope_theta, **whole}


def _written_own(config: Config, family: Family) -> dict[str, Any]:
    model, moe, kind = config.model, config.moe, family.model_type
    found: dict[str, Any] = {}
    if kind == "qwen2_moe":
        found |= {"qkv_bias": model.attention_bias, "shared_expert_intermediate_size": moe.shared_expert_hidden_size}
    elif kind != "mixtral":
        found["attention_bias"] = model.attention_bias
    if kind in ("qwen2_moe", "qwen3_moe", "olmoe"):
        found["norm_topk_prob"] = moe.norm_topk_prob
    if kind in ("qwen2_moe", "qwen3_moe"):
        found |= {"decoder_sparse_step": 1, "mlp_only_layers": list(range(model.num_dense_layers))}
        found["intermediate_size"] = model.dense_hidden_size or moe.expert_hidden_size
        found["use_sliding_window"] = model.sliding_window is not None
    if kind in ("qwen2_moe", "gpt_oss"):
        near = range(model.num_layers) if model.sliding_layers is None else model.sliding_layers
        near = near if model.sliding_window else ()
        found["layer_types"] = [f"{'sliding' if i in near else 'full'}_attention" for i in range(model.num_layers)]
    if kind == "gpt_oss":
        found |= {"swiglu_alpha": moe.swiglu_alpha, "swiglu_limit": moe.swiglu_limit}
    return found
