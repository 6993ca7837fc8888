"""Scores -> expert ids and weights. `make_router` is where a router's name becomes an object."""

from __future__ import annotations

from collections.abc import Callable

from ...backends.protocol import Ops
from ..config import MoeConfig
from .base import Memo, Router, Routing, Tokens
from .topk import TopKRouter

__all__ = ["Memo", "Router", "Routing", "Tokens", "make_router", "register_router", "router_names"]

RouterFactory = Callable[[Ops, MoeConfig, int, int, float], Router]


def _switch(ops: Ops, moe: MoeConfig, width: int, seed: int, std: float) -> Router:
    """Switch: top-1, weighted by its own softmax probability."""
    return TopKRouter(ops, moe.model_copy(update={"top_k": 1, "norm_topk_prob": False}), width, seed, std)


_ROUTERS: dict[str, RouterFactory] = {"topk": TopKRouter, "switch": _switch}


def register_router(name: str, factory: RouterFactory) -> None:
    """Make `moe.router: name` known. ValueError if the name is taken."""
    if name in _ROUTERS:
        raise ValueError(f"a router named {name!r} exists already; choose another name")
    _ROUTERS[name] = factory


def router_names() -> list[str]:
    """Values that `moe.router` may have now."""
    return sorted(_ROUTERS)


def make_router(ops: Ops, moe: MoeConfig, width: int, seed: int, std: float) -> Router:
    """The router `moe.router` for tokens of `width`. ValueError for an unknown name."""
    if moe.router not in _ROUTERS:
        raise ValueError(f"moe.router={moe.router!r} is unknown; choose one of {', '.join(router_names())}")
    return _ROUTERS[moe.router](ops, moe, width, seed, std)
