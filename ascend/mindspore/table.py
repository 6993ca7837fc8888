"""The op table: where the two devices differ, and why. Everything else in `host_ops` and `npu_ops` is one function.

A test compares this page with the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """How each device does an operation, and why not alike."""

    host: str
    npu: str
    why: str


_ROWS = "MindSpore's host kernels fail on empty indices and promise no order; the plain form is tested on the host"
_SPEED = "host kernels for broadcasting and last-axis sums take ten times as long; the plain form is tested on the host"

DIFFERENT: Mapping[str, Entry] = {
    "argsort": Entry("NumPy", "mint.argsort(stable=True)", "the stable sort has no host kernel"),
    "attention": Entry("batched products, NumPy between", "flash_attention_score, plain in float32", _SPEED),
    "cast": Entry("refuses bfloat16", "refuses float64", "neither device computes in every dtype"),
    "combine_rows": Entry("NumPy", "moe_token_unpermute", "no host kernel"),
    "count": Entry("NumPy", "mint.index_add of ones", _ROWS),
    "cross_entropy": Entry("NumPy", "plain", _SPEED),
    "expert_mlp": Entry("NumPy", "GroupedMatmulV4 and swiglu", "no host kernels"),
    "grouped_matmul": Entry("NumPy, group by group", "GroupedMatmulV4", "no host kernel"),
    "invert": Entry("NumPy", "mint.scatter", _ROWS),
    "logsumexp": Entry("NumPy", "plain", _SPEED),
    "rms_norm": Entry("NumPy", "RmsNorm", "no host kernel"),
    "rotary": Entry("NumPy", "plain", _SPEED),
    "router_topk": Entry("streaming over host_ops", "streaming over npu_ops", "composed of the operations around it"),
    "sum_rows": Entry("sparse product in ascending order", "mint.index_add, deterministic kernels", _ROWS),
    "take_rows": Entry("NumPy", "gather and mask", _ROWS),
    "topk": Entry("argmax rounds in NumPy", "argmax rounds", _SPEED),
}

UNUSED: Mapping[str, str] = {
    "MoeGatingTopKSoftmax": "order among equal scores is not stated and its softmax can make scores equal; the rule is "
    "higher score, then lower id",
    "moe_token_permute": "sorts by expert inside; the core sorts once, keeps the order and drops copies",
    "moe_init_routing_v2": "inference: no gradient",
    "moe_distribute_dispatch": "inference: no gradient, at most 512 tokens a rank in practice",
}
"""Fused Ascend kernels that are left aside, and why."""
