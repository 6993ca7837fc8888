"""Hugging Face checkpoints come in and go out byte for byte; what does not belong is refused by name."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twinmoe.moe_core import convert
from twinmoe.moe_core.checkpoint import Checkpoint, logical_shapes
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.hf_config import differences, from_config, to_config
from twinmoe.moe_core.hf_files import make_header, narrowed, parse_header, read_header, widened, write_file
from twinmoe.moe_core.hf_names import by_theirs, links, their_shape
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.shapes import declared, shapes

MODEL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 4}
MOE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 8, "aux_loss_layers": "concatenated"}
GPT_OSS = (
    {
        "attention_bias": True,
        "attention_output_bias": True,
        "attention_sinks": True,
        "sliding_window": 8,
        "sliding_layers": (0,),
        "rope_scaling": {"factor": 32.0, "original_length": 4096, "truncate": False},
    },
    {
        "activation": "swiglu_clamped",
        "softmax_order": "after_topk",
        "expert_bias": True,
        "router_bias": True,
        "norm_topk_prob": False,
    },
)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": ({"num_key_value_heads": 2, "sliding_window": 12}, {}),
    "qwen2_moe": (
        {"attention_bias": True, "num_dense_layers": 1, "dense_hidden_size": 24},
        {"num_shared_experts": 1, "shared_expert_hidden_size": 12, "shared_expert_gate": True},
    ),
    "qwen3_moe": ({"qk_norm": True, "attention_head_dim": 8, "tie_embeddings": True}, {"norm_topk_prob": False}),
    "olmoe": ({"qk_norm": "whole"}, {"norm_topk_prob": False}),
    "gpt_oss": GPT_OSS,
}


def config_of(family: str) -> Config:
    model, moe = FAMILIES[family]
    return Config.model_validate({"model": MODEL | model, "moe": MOE | moe})


def write_model(folder: Path, config: Config, dtype: str = "BF16", files: int = 1) -> Path:
    """A folder as transformers would save it, random values."""
    family, about = from_config(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "tokenizer.json").write_text('{"model": "none"}')
    shapes = logical_shapes(declared(config, Mesh()))
    wanted = {n: their_shape(g, shapes) for n, g in by_theirs(list(links(family, config))).items()}
    rng = np.random.default_rng(0)
    names, weight_map = list(wanted), {}
    for number in range(files):
        file = "model.safetensors" if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {n: (dtype, wanted[n]) for n in names[number::files]}
        weight_map |= dict.fromkeys(part, file)
        write_file(folder / file, make_header(part), ((rng.normal(size=s), d) for d, s in part.values()))
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_bytes(family: str, dtype: str, tmp_path: Path) -> None:
    theirs = write_model(tmp_path / "theirs", config_of(family), dtype, files=3)
    report = convert.from_hf(theirs, tmp_path / "ours")
    assert report["model_type"] == family
    convert.to_hf(tmp_path / "ours", tmp_path / "back")
    assert contents(theirs) == contents(tmp_path / "back")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_original_a_model_is_written_that_transformers_has(family: str, tmp_path: Path) -> None:
    theirs = write_model(tmp_path / "theirs", config_of(family), "F32")
    convert.from_hf(theirs, tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / convert.KEPT)
    assert convert.to_hf(tmp_path / "ours", tmp_path / "back")["model_type"] == family
    for name, about in parse_header(read_header(theirs / "model.safetensors")).items():
        assert parse_header(read_header(tmp_path / "back" / "model.safetensors"))[name] == about
    old, new = ((f / "model.safetensors").read_bytes() for f in (theirs, tmp_path / "back"))
    assert old == new


def test_a_copy_of_the_weights_that_no_index_names_is_left_alone(tmp_path: Path) -> None:
    """Mixtral's folder holds them a second time, as consolidated files."""
    theirs = write_model(tmp_path / "theirs", config_of("mixtral"), files=2)
    write_file(theirs / "consolidated.safetensors", make_header({"other": ("F32", (2,))}), [(np.zeros(2), "F32")])
    assert convert.from_hf(theirs, tmp_path / "ours")["tensors"] == 41


def test_a_real_file_of_transformers_makes_the_trip(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    import torch
    from twinmoe.testing.end_to_end.huggingface import MODELS, make_theirs

    for name in MODELS:
        theirs, ours, back = (tmp_path / f"{name} {part}" for part in ("theirs", "ours", "back"))
        make_theirs(name).to(torch.bfloat16).save_pretrained(theirs, max_shard_size="30KB")
        convert.from_hf(theirs, ours)
        convert.to_hf(ours, back)
        assert contents(theirs) == contents(back), name


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_map_both_ways(family: str) -> None:
    found, about = from_config(config_of(family))
    assert found.model_type == family
    assert from_config(to_config(about)) == (found, about)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b", "gpt-oss-120b"])
def test_the_packaged_shapes_have_as_many_parameters_as_the_models_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    import torch

    family, about = from_config(load_config(name))
    kind = getattr(transformers, family.architecture)
    with torch.device("meta"):
        theirs = kind(kind.config_class(**about))
    assert shapes(load_config(name)).parameters_total == sum(p.numel() for p in theirs.parameters())


GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(("name", "about"), [("gpt-oss-120b", GPT_OSS_120B), ("qwen3-30b-a3b", QWEN3_30B_A3B)])
def test_configs_as_older_versions_wrote_them_are_the_packaged_shapes(name: str, about: dict[str, Any]) -> None:
    assert differences(to_config(about), load_config(name)) == []


# --- what does not belong ------------------------------------------------------------------------
def _rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


GATE = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(GATE), f"lacks {GATE}"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "holds extra"),
        (lambda t: t.update({GATE: t[GATE].T.copy()}), f"{GATE} in model.safetensors is transposed"),
        (lambda t: t.update({GATE: t[GATE][:5].copy()}), f"{GATE} in model.safetensors has another shape"),
    ],
    ids=["missing", "extra", "transposed", "short"],
)
def test_a_tensor_that_does_not_fit_is_named(change: Any, told: str, tmp_path: Path) -> None:
    theirs = write_model(tmp_path / "theirs", config_of("mixtral"), "F32")
    _rewrite(theirs, change)
    with pytest.raises(ConfigError, match=told):
        convert.from_hf(theirs, tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ({"model_type": "deepseek_v3"}, "deepseek_v3 is not converted: its attention is MLA"),
        ({"model_type": "llama"}, "llama is not converted"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "the weights are mxfp4"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not computed here"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rotary embedding 'llama3'"),
        ({"num_experts_per_tok": None}, "lacks num_experts_per_tok"),
    ],
)
def test_models_that_are_not_computed_here_are_refused_by_name(about: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        to_config({**from_config(config_of("mixtral"))[1], **about})


def test_a_config_that_transformers_does_not_have_is_refused() -> None:
    config = config_of("mixtral")
    odd = config.model_copy(update={"moe": config.moe.model_copy(update={"score_function": "sigmoid"})})
    with pytest.raises(ConfigError, match=r"none of the models that transformers has.*moe.score_function"):
        from_config(odd)


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    theirs = write_model(tmp_path / "theirs", config_of("mixtral"))
    file = theirs / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"model\.safetensors is cut short"):
        convert.from_hf(theirs, tmp_path / "ours")


# --- sizes and numbers ---------------------------------------------------------------------------
def peak_and_sizes(folder: Path, width: int) -> tuple[int, list[int]]:
    model, moe = MODEL | {"hidden_size": width}, MOE | {"num_experts": 16, "expert_hidden_size": width}
    config = Config.model_validate({"model": model, "moe": moe})
    folder.mkdir()
    theirs = write_model(folder / "theirs", config, files=2)
    tracemalloc.start()
    convert.from_hf(theirs, folder / "ours")
    convert.to_hf(folder / "ours", folder / "back")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, [4 * int(np.prod(s)) for s in logical_shapes(declared(config, Mesh())).values()]


def test_memory_grows_by_a_few_copies_of_one_tensor_not_by_the_model(tmp_path: Path) -> None:
    small, few = peak_and_sizes(tmp_path / "small", 32)
    large, many = peak_and_sizes(tmp_path / "large", 256)
    assert sum(many) > 30 * max(many)
    assert large - small < 5 * (max(many) - max(few))


def test_a_converted_folder_is_a_checkpoint_whose_sums_are_checked(tmp_path: Path) -> None:
    convert.from_hf(write_model(tmp_path / "theirs", config_of("qwen3_moe")), tmp_path / "ours")
    checkpoint = Checkpoint(tmp_path / "ours")
    checkpoint.check_complete(logical_shapes(declared(config_of("qwen3_moe"), Mesh())))
    assert checkpoint.step == 0


@lru_cache
def all_bfloat16() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint32).astype("<u2")


def test_every_bfloat16_survives() -> None:
    np.testing.assert_array_equal(narrowed(widened(all_bfloat16(), "BF16"), "BF16"), all_bfloat16())


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    values[:4] = [1.00390625, 1.01171875, np.inf, 3.4e38]  # two ties, infinity, rounds up to infinity
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view("<u2")
    np.testing.assert_array_equal(narrowed(values, "BF16"), expected)
