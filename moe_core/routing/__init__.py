"""Scores -> expert ids and weights. `make_router` is where a router's name becomes an object.

Names are those of this package, those given to `register_router`, and those that installed packages declare as entry
points in the group `twinmoe.routers`: a factory as `register_router` takes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .base import Choice, Chooser, Memo, Router, RouterContext, Routing, Tokens
from .expert_choice import ExpertChoice
from .gate import gate
from .grap import GroupedAveragePooling, TokenResonance
from .hashed import HashRouter, Hierarchical
from .pipeline import ChooserRouter
from .topk import LearnedGate

__all__ = [
    "Choice",
    "Chooser",
    "ChooserRouter",
    "Memo",
    "Router",
    "RouterContext",
    "Routing",
    "Tokens",
    "gate",
    "make_router",
    "register_router",
    "router_names",
]

GROUP = "twinmoe.routers"
ChooserFactory = Callable[[RouterContext], Chooser]


def _with(factory: ChooserFactory, **fields: Any) -> Callable[[RouterContext], Router]:
    """A router whose name settles some of the config's fields."""

    def make(context: RouterContext) -> Router:
        settled = replace(context, moe=context.moe.model_copy(update=fields))
        return ChooserRouter(settled, factory(settled))

    return make


_ROUTERS: dict[str, Callable[[RouterContext], Router]] = {
    "topk": _with(LearnedGate),
    "switch": _with(LearnedGate, top_k=1, norm_topk_prob=False),
    "grap": _with(GroupedAveragePooling),
    "hash": _with(HashRouter),
    "hierarchical": _with(Hierarchical),
    "domain": _with(Hierarchical),
    "random_routed": _with(Hierarchical, inner_router="random"),
    "expert_token_resonance": _with(TokenResonance),
    "expert_choice": _with(ExpertChoice),
}


def register_router(name: str, factory: ChooserFactory) -> None:
    """Make `moe.router: name` known: factory(context) returns a `Chooser`. ValueError if the name is taken."""
    if name in _ROUTERS:
        raise ValueError(f"a router named {name!r} exists already; choose another name")
    _ROUTERS[name] = _with(factory)


def router_names() -> list[str]:
    """Values that `moe.router` may have now."""
    return sorted({*_ROUTERS, *_offered(tuple(sys.path))})


@lru_cache(maxsize=1)
def _offered(path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """What packages on the path offer: reading their metadata takes some milliseconds."""
    return {point.name: point for point in entry_points(group=GROUP)}


def make_router(context: RouterContext) -> Router:
    """The router `moe.router`. ValueError for an unknown name."""
    name, offered = context.moe.router, _offered(tuple(sys.path))
    if name not in _ROUTERS and name in offered:
        register_router(name, offered[name].load())
    if name not in _ROUTERS:
        raise ValueError(f"moe.router={name!r} is unknown; choose one of {', '.join(router_names())}")
    return _ROUTERS[name](context)
