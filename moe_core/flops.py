"""Floating-point operations that training a token needs, and what devices could do: model FLOPs utilisation.

Counted is what the model asks for, not what a run spends: recomputation, padding and communication are not in it.
Products with a weight count 2 per element that a token meets, causal attention 2 x length x (query + value widths) / 2;
backward is twice forward (the convention of PaLM, appendix B, with the causal half).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from .config import Config
from .mesh import Mesh
from .shapes import declared

PEAK_TFLOPS: Mapping[str, float] = {"H100 80GB HBM3": 989.4, "H200": 989.4, "A100-SXM4": 312.0}
"""Dense bfloat16 peak by a part of the device's name, from NVIDIA's data sheets (SXM)."""


def training_flops(config: Config) -> float:
    """Of one token, forward and backward."""
    share = config.moe.top_k / config.moe.num_experts
    products = 0.0
    for parameter in declared(config, Mesh()):
        stacked = bool(parameter.pieces)
        if len(parameter.shape) < 2 + stacked:
            continue  # norms and biases
        if parameter.name.endswith("w_embedding") and not config.model.tie_embeddings:
            continue  # looked up, not multiplied
        products += 2 * prod(parameter.shape) * (share if stacked and not parameter.name.endswith("w_router") else 1.0)
    return 3 * (products + _attention(config))


def _attention(config: Config) -> float:
    model = config.model
    width = model.attention_head_dim or model.hidden_size // model.num_attention_heads
    seen = 0.0
    for layer in range(model.num_layers):
        near = model.sliding_window if _slides(config, layer) else None
        seen += min(config.train.sequence_length / 2, near or float("inf"))
    return 4 * seen * model.num_attention_heads * width


def _slides(config: Config, layer: int) -> bool:
    layers = config.model.sliding_layers
    return config.model.sliding_window is not None and (layers is None or layer in layers)


def peak_of(device: str) -> float | None:
    """Peak TFLOP/s of a device by its name; None where no data sheet is known here."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None)
