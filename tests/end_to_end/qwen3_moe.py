"""The same decoder twice, ours and the Qwen3-MoE of transformers, with the same weights, batch and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from twinmoe.backends.protocol import Communicator, Launch, State, TrainOptions
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.data import GlobalBatch
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.model import Model, build_model

EXPERTS = ("eager", "grouped_mm")


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder and of a batch; aux: coefficient of transformers' balance loss (0: none)."""

    experts: int = 8
    top_k: int = 2
    hidden: int = 256
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 257
    sequences: int = 8
    length: int = 256
    aux: float = 0.001
    tied: bool = True


def our_config(shape: Shape) -> Config:
    """Our balance loss is the other one over top_k (its shares sum to 1), so its coefficient takes that factor."""
    model = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "qk_norm": True,
        "tie_embeddings": shape.tied,
    }
    moe = {
        "num_experts": shape.experts,
        "top_k": shape.top_k,
        "expert_hidden_size": shape.hidden,
        "aux_loss_coeff": shape.aux * shape.top_k,
        "aux_loss_scope": "global",
        "aux_loss_layers": "concatenated",
    }
    train = {"global_batch_size": shape.sequences, "sequence_length": shape.length}
    return Config.model_validate({"model": model, "moe": moe, "train": train})


def random_batch(shape: Shape, seed: int = 0) -> GlobalBatch:
    """Whole sequences without padding or document borders."""
    rng = np.random.default_rng(seed)
    size = (shape.sequences, shape.length)
    tokens, targets = rng.integers(0, shape.vocabulary, (2, *size))
    flat, order = np.zeros(size, np.int64), np.arange(shape.sequences)
    return GlobalBatch(tokens, targets, flat == 0, flat, order, order * 0, tokens.size, tokens.size)


@dataclass(frozen=True)
class Ours:
    """Our model in training on one rank."""

    backend: Backend
    model: Model
    state: State

    @classmethod
    def build(cls, backend: Backend, shape: Shape, options: TrainOptions) -> Ours:
        comm: Communicator = backend.comm.connect(Launch())
        config = our_config(shape)
        runtime = make_runtime(backend.ops, comm, Mesh(), config.parallel, config.cluster)
        model = build_model(config, runtime)
        return cls(backend, model, backend.trainer.build(model.components, options, runtime.groups, comm))

    def forward_backward(self, batch: GlobalBatch) -> Any:
        """The loss, a scalar of the backend; gradients stay in the state."""
        return self.backend.trainer.accumulate(self.state, lambda: self.model.loss(self.state.modules, batch))[0]

    def values(self) -> dict[str, np.ndarray]:
        """Parameters by name."""
        return {name: value for name, kind, value in self.backend.trainer.tensors(self.state) if kind == "parameter"}


def build_qwen3(shape: Shape, values: Mapping[str, np.ndarray], experts: str) -> nn.Module:
    """transformers' model with our values. experts: `eager` or `grouped_mm`. ImportError without transformers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    words: dict[str, Any] = dict(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.width // shape.heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.hidden,
        norm_topk_prob=True,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=shape.tied,
        router_aux_loss_coef=shape.aux,
        output_router_logits=bool(shape.aux),
        max_position_embeddings=shape.length,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**words)).train()
    theirs = dict(model.named_parameters())
    pairs = dict(names(shape))
    assert set(pairs.values()) == set(theirs), "every parameter has its counterpart"
    with torch.no_grad():
        for ours, name in pairs.items():
            theirs[name].copy_(torch.from_numpy(in_layout(ours, values[ours])))
    return model


def qwen3_loss(model: Callable[..., Any], batch: GlobalBatch) -> Tensor:
    """Cross-entropy of the batch's own targets plus the balance loss."""
    tokens, targets = torch.from_numpy(batch.tokens_SL), torch.from_numpy(batch.targets_SL)
    return model(input_ids=tokens, labels=tokens, shift_labels=targets).loss


def in_layout(name: str, value: np.ndarray) -> np.ndarray:
    """A value of ours in their layout or back: matrices but the embedding, (in, out) here, are (out, in) there."""
    return np.swapaxes(value, -1, -2).copy() if value.ndim > 1 and "embedding" not in name else value


def names(shape: Shape) -> Iterator[tuple[str, str]]:
    """(our name, theirs) of every parameter."""
    yield "vocabulary.w_embedding", "model.embed_tokens.weight"
    yield "vocabulary.norm", "model.norm.weight"
    if not shape.tied:
        yield "vocabulary.w_head", "lm_head.weight"
    for i in range(shape.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        yield ours + "norm_1", theirs + "input_layernorm.weight"
        yield ours + "norm_2", theirs + "post_attention_layernorm.weight"
        for n in "qkvo":
            yield ours + f"attention.w_{n}", theirs + f"self_attn.{n}_proj.weight"
        for n in "qk":
            yield ours + f"attention.norm_{n}", theirs + f"self_attn.{n}_norm.weight"
        yield ours + "moe.w_router", theirs + "mlp.gate.weight"
        yield ours + "moe.w_up", theirs + "mlp.experts.gate_up_proj"
        yield ours + "moe.w_down", theirs + "mlp.experts.down_proj"
