"""Bytes that one exchange sends from a rank: Head Parallel beside expert parallelism, flat and deduplicated."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb


@dataclass(frozen=True)
class Layer:
    """`tokens` of a rank, `width` = N_h d_h elements of `itemsize` bytes each, on `ranks` ranks.

    For expert parallelism: `top_k` of `experts` experts a token, chosen uniformly, in equal shares on the ranks.
    """

    tokens: int
    width: int
    ranks: int
    top_k: int = 1
    experts: int = 128
    itemsize: int = 2

    @property
    def token_bytes(self) -> int:
        """Bytes of all tokens of a rank."""
        return self.tokens * self.width * self.itemsize


def head_parallel(layer: Layer, group: int = 1) -> float:
    """V (W - g) / W with V the bytes of a rank's tokens: whatever k, the experts and the routing are.

    group: neighbouring ranks that count as one place (the ranks of a node), whose traffic is left out.
    """
    return layer.token_bytes * (layer.ranks - group) / layer.ranks


def flat(layer: Layer, group: int = 1) -> float:
    """k V (W - g) / W: a copy for each expert (mean over uniform choices)."""
    return layer.top_k * layer.token_bytes * (layer.ranks - group) / layer.ranks


def deduplicated(layer: Layer, group: int = 1) -> float:
    """V (P - 1) p with P = W / g places and p the probability that a token has an expert in one of them."""
    places = layer.ranks // group
    nowhere = comb(layer.experts - layer.experts // places, layer.top_k) / comb(layer.experts, layer.top_k)
    return layer.token_bytes * (places - 1) * (1 - nowhere)
