"""Small random models that transformers makes, and ours started from their folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from twinmoe.backends.protocol import Launch, State, TrainOptions
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.build import make_runtime
from twinmoe.moe_core.compose import load_config
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.data import GlobalBatch
from twinmoe.moe_core.init_from import TheirSource, open_source, started_from
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.model import Model, build_model

SIZES: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    router_aux_loss_coef=0.02,
    output_router_logits=True,
    use_cache=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    initializer_range=0.1,
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
EXPERTS = {"num_experts": 6, "moe_intermediate_size": 24, "intermediate_size": 40}
LOCAL = {"num_local_experts": 6, "intermediate_size": 24}

MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", LOCAL),
    "mixtral window": ("Mixtral", LOCAL | {"sliding_window": 7}),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 20}),
    "qwen2_moe mixed": (
        "Qwen2Moe",
        EXPERTS
        | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [0], "norm_topk_prob": True}
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    ),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe biased": ("Qwen3Moe", EXPERTS | {"attention_bias": True, "tie_word_embeddings": True}),
    "olmoe": ("Olmoe", {"num_experts": 6, "intermediate_size": 24}),
    "gpt_oss": ("GptOss", LOCAL | {"head_dim": 8, "sliding_window": 6, "rope_parameters": YARN, "swiglu_limit": 0.3}),
}


def make_theirs(name: str, **sizes: Any) -> Any:
    """A model with random values everywhere, biases and norms too."""
    kind, own = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **sizes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "bias" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_batch(vocabulary: int = 96, sequences: int = 3, length: int = 24, seed: int = 0) -> GlobalBatch:
    """Whole sequences without padding or document borders."""
    size = (sequences, length)
    tokens, targets = np.random.default_rng(seed).integers(0, vocabulary, (2, *size))
    flat, order = np.zeros(size, np.int64), np.arange(sequences)
    return GlobalBatch(tokens, targets, flat == 0, flat, order, order * 0, tokens.size, tokens.size)


@dataclass(frozen=True)
class Ours:
    """Our model in training on one rank, and the logits that it last made."""

    config: Config
    backend: Backend
    model: Model
    state: State
    logits: list[np.ndarray]

    @classmethod
    def start(cls, backend: Backend, folder: Path, batch: GlobalBatch) -> Ours:
        """As `model.init_from: folder` would."""
        train = {"global_batch_size": batch.sequences, "sequence_length": batch.tokens_SL.shape[1]}
        config = load_config({"model": {"init_from": str(folder)}, "train": train})
        logits: list[np.ndarray] = []

        def watched(logits_TV: Any, targets_T: Any) -> Any:
            logits.append(backend.ops.to_numpy(logits_TV))
            return backend.ops.cross_entropy(logits_TV, targets_T)

        names = {n: getattr(backend.ops, n) for n in dir(backend.ops) if not n.startswith("_")}
        ops: Any = SimpleNamespace(**{**names, "cross_entropy": watched})
        runtime = make_runtime(ops, backend.comm.connect(Launch()), Mesh(), config.parallel, config.cluster)
        model = build_model(config, runtime)
        components = started_from(model.components, open_source(folder, config))
        state = backend.trainer.build(components, TrainOptions(), runtime.groups, runtime.comm)
        return cls(config, replace(backend, ops=ops), model, state, logits)

    def forward_backward(self, batch: GlobalBatch) -> float:
        """The loss; gradients stay in the state."""
        loss_of: Callable[[], Any] = lambda: self.model.loss(self.state.modules, batch)  # noqa: E731
        return float(self.backend.ops.to_numpy(self.backend.trainer.accumulate(self.state, loss_of)[0]))


def their_step(model: nn.Module, batch: GlobalBatch) -> tuple[np.ndarray, float]:
    """(logits, loss with the balance loss); gradients stay in the model."""
    tokens, targets = torch.from_numpy(batch.tokens_SL), torch.from_numpy(batch.targets_SL)
    out = model(input_ids=tokens, labels=tokens, shift_labels=targets)
    out.loss.backward()
    return out.logits.detach().numpy().reshape(-1, out.logits.shape[-1]), float(out.loss.detach())


def gradients_in_our_layout(model: Any, folder: Path) -> TheirSource:
    """Their gradients, saved like weights and read like weights."""
    model.save_pretrained(folder, state_dict={n: p.grad for n, p in model.named_parameters()})
    return TheirSource(folder)
