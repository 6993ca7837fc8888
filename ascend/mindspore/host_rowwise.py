"""Reductions along the last axis on the host, each with its gradient in one pass of NumPy.

MindSpore's host kernels broadcast and reduce about ten times as slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Tensor

from .autograd import primitive


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis; statistics in at least float32."""
    return _rms_norm_op(x, weight, eps)


def rotary(x_SLHA: Tensor, cos_1L1A: Tensor, sin_1L1A: Tensor) -> Tensor:
    """x * cos + (-x2, x1) * sin with (x1, x2) the halves of the last axis; in at least float32."""
    return _rotary_op(x_SLHA, cos_1L1A, sin_1L1A)


def logsumexp(x: Tensor) -> Tensor:
    """Along the last axis, which disappears; stable."""
    return _logsumexp_op(x)


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Negative log-likelihood of each target, (T,), in at least float32."""
    return _cross_entropy_op(logits_TV, targets_T)


def _widen(x: np.ndarray) -> np.ndarray:
    return x.astype(np.result_type(x.dtype, np.float32), copy=False)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...d,...d->...", a, b)[..., None]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = _widen(x.asnumpy())
    inverse = 1 / np.sqrt(_dot(wide, wide) / wide.dtype.type(x.shape[-1]) + wide.dtype.type(eps))
    y = wide * inverse
    y *= weight.asnumpy()
    return Tensor.from_numpy(y.astype(x.asnumpy().dtype, copy=False)), (x, weight, Tensor.from_numpy(inverse))


def _rms_norm_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    x, weight, inverse = (s.asnumpy() for s in saved)
    normal, g = _widen(x) * inverse, _widen(gradient.asnumpy())
    width = x.shape[-1]
    dweight = np.einsum("nd,nd->d", g.reshape(-1, width), normal.reshape(-1, width)) if x.size else np.zeros(width)
    g = g * weight
    g -= normal * (_dot(g, normal) / g.dtype.type(width))
    dx = (g * inverse).astype(x.dtype, copy=False)
    return Tensor.from_numpy(dx), Tensor.from_numpy(dweight.astype(weight.dtype, copy=False))


def _turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> Tensor:
    half = x.shape[-1] // 2
    y = _widen(x) * cos
    y[..., :half] -= x[..., half:] * sin[..., half:]
    y[..., half:] += x[..., :half] * sin[..., :half]
    return Tensor.from_numpy(y.astype(x.dtype, copy=False))


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _turned(x.asnumpy(), cos.asnumpy(), sin.asnumpy()), (cos, sin)


def _rotary_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    """A turn is undone by the turn of the opposite angle."""
    cos, sin = (s.asnumpy() for s in saved)
    return _turned(gradient.asnumpy(), cos, -sin), None, None


def _total(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0).astype(x.dtype)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top[..., None]).sum(-1)) + top


def _logsumexp(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    total = Tensor.from_numpy(_total(x.asnumpy()))
    return total, (x, total)


def _logsumexp_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    x, total = (s.asnumpy() for s in saved)
    return (Tensor.from_numpy(np.exp(x - total[..., None]) * gradient.asnumpy()[..., None]),)


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide, at = _widen(logits.asnumpy()), targets.asnumpy()
    total = _total(wide)
    return Tensor.from_numpy(total - wide[np.arange(len(at)), at]), (logits, targets, Tensor.from_numpy(total))


def _cross_entropy_backward(gradient: Tensor, saved: Sequence[Tensor], _inputs: Any, _needs: Any) -> tuple[Any, ...]:
    logits, at, total = (s.asnumpy() for s in saved)
    p = np.exp(_widen(logits) - total[:, None])
    p[np.arange(len(at)), at] -= 1
    p *= gradient.asnumpy()[:, None]
    return (Tensor.from_numpy(p.astype(logits.dtype, copy=False)),)


_rms_norm_op = primitive(_rms_norm, _rms_norm_backward)
_rotary_op = primitive(_rotary, _rotary_backward)
_logsumexp_op = primitive(_logsumexp, _logsumexp_backward)
_cross_entropy_op = primitive(_cross_entropy, _cross_entropy_backward)
