"""The oracle: a dense masked MoE layer with a hand-written backward. NumPy float64; imports nothing of this project.

Every expert is applied to every token and weighed by a (T, E) matrix that is zero where a token did not choose.
T tokens, D width, K choices, E experts, F expert width; y = x @ w. Parameters: w_router (D, E), w_up (E, D, 2F or F),
w_down (E, F, D); optional w_shared_up, w_shared_down (stacks of one; every token visits), w_shared_gate (D, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
erf = np.vectorize(math.erf, otypes=[float])


@dataclass(frozen=True)
class Moe:
    """The layer's function. Anything with these attributes will do in its place."""

    num_experts: int
    top_k: int
    router: str = "topk"
    activation: str = "swiglu"
    score_function: str = "softmax"
    softmax_order: str = "before_topk"
    norm_topk_prob: bool = True
    route_scale: float = 1.0
    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0


@dataclass(frozen=True)
class Batch:
    """x (T, D) of `sequences` equal sequences. total: real tokens of the whole step; keep_TK: False = dropped."""

    x: Array
    sequences: int
    total: float
    layers: int = 1
    real_T: Array | None = None
    keep_TK: Array | None = None


@dataclass(frozen=True)
class Result:
    """grads, by parameter and 'x': of sum(y dy) + aux_loss_coeff load_balance + z_loss_coeff z. ids: -1 = padding."""

    y: Array
    ids: Array
    weights: Array
    losses: dict[str, float]
    grads: dict[str, Array]


def scores_of(kind: str, z: Array) -> tuple[Array, Callable[[Array], Array]]:
    """softmax or sigmoid of logits, and its backward."""
    if kind == "sigmoid":
        s = 0.5 * (1 + np.tanh(0.5 * z))
        return s, lambda d: d * s * (1 - s)
    p = np.exp(z - z.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    return p, lambda d: p * (d - (d * p).sum(-1, keepdims=True))


def top_k(logits: Array, k: int) -> Array:
    """Larger logit first, then lower id; NaN counts as minus infinity."""
    return np.argsort(-np.where(np.isnan(logits), -np.inf, logits), axis=1, kind="stable")[:, :k]


def feed_forward(x: Array, up: Array, down: Array, activation: str) -> tuple[Array, Callable]:
    """One expert on all tokens, and dy -> (dx, d_up, d_down). gelu is exact; swiglu has gate columns first."""
    h = x @ up
    if activation == "gelu":
        phi = 0.5 * (1 + erf(h / math.sqrt(2)))
        a, slope = h * phi, lambda da: da * (phi + h * np.exp(-h * h / 2) / math.sqrt(2 * math.pi))
    else:
        gate, linear = np.split(h, 2, 1)
        s, _ = scores_of("sigmoid", gate)
        a = gate * s * linear
        slope = lambda da: np.concatenate([da * linear * (s + gate * s * (1 - s)), da * gate * s], 1)  # noqa: E731
    return a @ down, lambda dy: (slope(dy @ down.T) @ up.T, x.T @ slope(dy @ down.T), a.T @ dy)


def weigh(moe: Moe, logits: Array, ids: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Weights (T, K) of the chosen, and d_weights -> d_logits. A single choice is never renormalised."""
    t = np.arange(len(ids))[:, None]
    after = moe.score_function == "softmax" and moe.softmax_order == "after_topk" and moe.router != "switch"
    scores, scores_back = scores_of(moe.score_function, logits[t, ids] if after else logits)
    picked = scores if after else scores[t, ids]
    normalise = moe.norm_topk_prob and ids.shape[1] > 1 and not after
    norm = picked.sum(-1, keepdims=True) if normalise else np.ones((len(ids), 1))

    def back(dw: Array) -> Array:
        d_picked, d_logits = dw * moe.route_scale / norm, np.zeros(logits.shape)
        d_picked = d_picked - normalise * (d_picked * picked).sum(-1, keepdims=True) / norm
        d_logits[t, ids] = scores_back(d_picked) if after else d_picked
        return d_logits if after else scores_back(d_logits)

    return picked / norm * moe.route_scale, back


def auxiliary(moe: Moe, logits: Array, ids: Array, b: Batch) -> tuple[dict[str, float], Array]:
    """Losses before coefficients over real tokens (ids >= 0), and the logits' gradient of their weighted sum:
    load_balance = (1/layers) sum_s (n_s / total) E sum_e f_se P_se with f_s the shares of choices, adding up to 1;
    z = (1/layers) (1/total) sum_t logsumexp(logits_t)^2."""
    scores, scores_back = scores_of(moe.score_function, logits)
    norm, real, f = scores.sum(-1, keepdims=True), (ids >= 0).any(1), np.zeros(logits.shape)
    for rows in np.split(np.arange(len(ids)), b.sequences):
        counts = np.bincount(ids[rows][ids[rows] >= 0], minlength=moe.num_experts)
        f[rows] = counts / max(1, counts.sum()) * real[rows, None] * moe.num_experts / (b.layers * b.total)
    balance = (f * scores / norm).sum(-1, keepdims=True)
    lse = np.logaddexp.reduce(logits, axis=-1, keepdims=True) * real[:, None]
    d_z = 2 * lse * scores_of("softmax", logits)[0] / (b.layers * b.total)
    d_logits = moe.aux_loss_coeff * scores_back((f - balance) / norm) + moe.z_loss_coeff * d_z
    return {"load_balance": float(balance.sum()), "z": float((lse**2).sum() / (b.layers * b.total))}, d_logits


def run(moe: Moe, params: Mapping[str, Array], b: Batch, dy: Array) -> Result:
    """Forward and backward of one layer."""
    p, x, num = {n: w.astype(np.float64) for n, w in params.items()}, b.x.astype(np.float64), moe.num_experts
    logits, t = x @ p["w_router"], np.arange(len(b.x))[:, None]
    picks = top_k(logits, 1 if moe.router == "switch" else moe.top_k)
    ids = picks if b.real_T is None else np.where(b.real_T[:, None], picks, -1)
    keep = (ids >= 0) & (True if b.keep_TK is None else b.keep_TK)
    weights, weigh_back = weigh(moe, logits, picks)
    losses, d_logits = auxiliary(moe, logits, ids, b)
    mixing = np.zeros((len(x), num + 1))  # the last column is the shared expert's
    mixing[t, picks] = weights * keep
    gate, gate_back = scores_of("sigmoid", x @ p["w_shared_gate"]) if "w_shared_gate" in p else (1.0, None)
    mixing[:, num:] = gate
    ups, downs = [*p["w_up"], *p.get("w_shared_up", [])], [*p["w_down"], *p.get("w_shared_down", [])]
    y, dx, d_mixing, d_ups, d_downs = np.zeros(x.shape), np.zeros(x.shape), np.zeros(mixing.shape), [], []
    for e, (up, down) in enumerate(zip(ups, downs, strict=True)):
        out, back = feed_forward(x, up, down, moe.activation)
        y, d_mixing[:, e] = y + mixing[:, e, None] * out, (dy * out).sum(-1)
        d_x, d_up, d_down = back(mixing[:, e, None] * dy)
        dx, d_ups, d_downs = dx + d_x, [*d_ups, d_up], [*d_downs, d_down]
    grads = {"w_up": np.stack(d_ups[:num]), "w_down": np.stack(d_downs[:num])}
    if "w_shared_up" in p:
        grads |= {"w_shared_up": np.stack(d_ups[num:]), "w_shared_down": np.stack(d_downs[num:])}
    if gate_back is not None:
        d_gate = gate_back(d_mixing[:, num:])
        grads["w_shared_gate"], dx = x.T @ d_gate, dx + d_gate @ p["w_shared_gate"].T
    d_logits = d_logits + weigh_back(d_mixing[t, picks] * keep)
    grads |= {"w_router": x.T @ d_logits, "x": dx + d_logits @ p["w_router"].T}
    return Result(y, ids, weights, losses, grads)
