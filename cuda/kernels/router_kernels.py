"""Routers whose scores stay on chip: products and selection, a tile of experts at a time."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)
"""What NaN and minus infinity count as: above the minus infinity of what is already taken or absent."""


@triton.jit
def _scores(x_desc, w_desc, row, head, heads, column, D, TERMS: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
            BK: tl.constexpr):  # fmt: skip
    """x @ w of one tile, float32; w is the sum of TERMS arrays of x's dtype."""
    acc = tl.zeros((BM, BE), tl.float32)
    steps = D // BK
    for step in tl.range(0, TERMS * steps):
        term = TERMS - 1 - step // steps  # smallest terms first
        k = (step % steps) * BK
        x = x_desc.load([row, head * D + k])
        w = w_desc.load([(term * heads + head) * D + k, column])
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def choose_kernel(
    x_desc, w_desc, bias_ptr, logits_ptr, ids_ptr, N, heads, D, E,
    K: tl.constexpr, SLOTS: tl.constexpr, TERMS: tl.constexpr, BIASED: tl.constexpr, BM: tl.constexpr,
    BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """ids and logits (N, heads, K) of the K best of x @ w + bias, best first, ties to the lower id.

    x_desc over (N, heads * D), box (BM, BK); w_desc over (TERMS * heads * D, >= E), box (BK, BE); bias (heads, E).
    SLOTS: K rounded up to a power of two.
    """
    row, head = tl.program_id(0) * BM, tl.program_id(1)
    slot = tl.arange(0, SLOTS)[None, :]
    best = tl.full((BM, SLOTS), float("-inf"), tl.float32)
    best_logit = tl.zeros((BM, SLOTS), tl.float32)
    best_id = tl.zeros((BM, SLOTS), tl.int32)
    for first in tl.range(0, E, BE):
        logits = _scores(x_desc, w_desc, row, head, heads, first, D, TERMS, BM, BE, BK)
        column = first + tl.arange(0, BE)
        scores = logits
        if BIASED:
            scores += tl.load(bias_ptr + head * E + column, mask=column < E, other=0.0)[None, :]
        scores = tl.where(scores > LOWEST, scores, LOWEST)
        scores = tl.where((column < E)[None, :], scores, float("-inf"))
        new, new_logit, new_id = best, best_logit, best_id
        for j in tl.static_range(K):
            here, before = tl.max(scores, axis=1), tl.max(best, axis=1)
            old = before >= here
            there = tl.min(tl.where(scores == here[:, None], column[None, :], E), axis=1)
            kept = tl.min(tl.where(best == before[:, None], slot, SLOTS), axis=1)
            at, was = column[None, :] == there[:, None], slot == kept[:, None]
            logit = tl.sum(tl.where(at, logits, 0.0), axis=1)
            logit = tl.where(old, tl.sum(tl.where(was, best_logit, 0.0), axis=1), logit)
            chosen = tl.where(old, tl.sum(tl.where(was, best_id, 0), axis=1), there)
            write = slot == j
            new = tl.where(write, tl.maximum(here, before)[:, None], new)
            new_logit = tl.where(write, logit[:, None], new_logit)
            new_id = tl.where(write, chosen[:, None], new_id)
            scores = tl.where(at & ~old[:, None], float("-inf"), scores)
            best = tl.where(was & old[:, None], float("-inf"), best)
        best, best_logit, best_id = new, new_logit, new_id
    rows = row + tl.arange(0, BM)
    place = (rows.to(tl.int64)[:, None] * heads + head) * K + slot
    mask = (rows < N)[:, None] & (slot < K)
    tl.store(logits_ptr + place, best_logit, mask=mask)
    tl.store(ids_ptr + place, best_id.to(tl.int64), mask=mask)


@triton.jit
def given_kernel(
    x_desc, w_desc, logits_ptr, ids_ptr, N, heads, D, E,
    K: tl.constexpr, SLOTS: tl.constexpr, TERMS: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Logits (N, heads, K) of given ids, by the products of `choose_kernel`: the same bits."""
    row, head = tl.program_id(0) * BM, tl.program_id(1)
    slot = tl.arange(0, SLOTS)[None, :]
    rows = row + tl.arange(0, BM)
    place = (rows.to(tl.int64)[:, None] * heads + head) * K + slot
    mask = (rows < N)[:, None] & (slot < K)
    ids = tl.load(ids_ptr + place, mask=mask, other=-1).to(tl.int32)
    found = tl.zeros((BM, SLOTS), tl.float32)
    for first in tl.range(0, E, BE):
        logits = _scores(x_desc, w_desc, row, head, heads, first, D, TERMS, BM, BE, BK)
        column = first + tl.arange(0, BE)
        for j in tl.static_range(K):
            wanted = tl.sum(tl.where(slot == j, ids, 0), axis=1)
            own = tl.sum(tl.where(column[None, :] == wanted[:, None], logits, 0.0), axis=1)
            found += tl.where(slot == j, own[:, None], 0.0)
    tl.store(logits_ptr + place, found, mask=mask)
