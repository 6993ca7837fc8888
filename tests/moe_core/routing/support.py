"""Routers asked for host values, in the same few lines for every test and backend. Float64 unless a test says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.config import MoeConfig
from twinmoe.moe_core.routing import Memo, Router, RouterContext, Routing, Tokens, make_router
from twinmoe.moe_core.transport.flat import Local
from twinmoe.testing.contract.adapters import adapter_of


def close(a: object, b: object, tolerance: float = 1e-9) -> None:
    """Equal relative to b, and near 0 absolutely."""
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)  # type: ignore[arg-type]


def settings(**fields: Any) -> MoeConfig:
    """A MoeConfig without losses unless asked for."""
    return MoeConfig(**{"aux_loss_coeff": 0.0, "router_dtype": "float64", **fields})


def context(ops: Any, moe: MoeConfig, width: int, **place: Any) -> RouterContext:
    return RouterContext(ops, moe, width, **{"std": 1.0, "vocab_size": 32, **place})


def tokens(ops: Any, number: int, **fields: Any) -> Tokens:
    """Tokens of one sequence, all real, unless `fields` says otherwise. Host arrays become device arrays."""
    for name in ("real_T", "token_ids_T"):
        if fields.get(name) is not None:
            fields[name] = ops.asarray(np.asarray(fields[name]))
    return Tokens(**{"sequences": 1, "total": float(number), **fields})


@dataclass(frozen=True)
class Routed:
    """A Routing on the host."""

    chosen: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    losses: dict[str, Any]
    statistics: dict[str, np.ndarray]
    nan: np.ndarray
    device: Routing

    @property
    def kept(self) -> set[int]:
        """Tokens of which some copy is computed."""
        return set(np.flatnonzero((self.ids >= 0).any(1)).tolist())


def on_host(ops: Any, routing: Routing) -> Routed:
    host = ops.to_numpy
    losses = {n: float(host(v)) if host(v).size == 1 else host(v) for n, v in routing.losses.items()}
    statistics = {n: host(v) for n, v in routing.statistics.items()}
    chosen, ids, weights = host(routing.chosen_TK), host(routing.ids_TK), host(routing.weights_TK)
    return Routed(chosen, ids, weights, losses, statistics, host(routing.nan_T), routing)


def values_of(ops: Any, router: Router, w_router: np.ndarray | None) -> dict[str, Any]:
    """The router's parameters on the device: their own draw, or `w_router`."""
    return {p.name: ops.asarray(p.initial() if w_router is None else np.array(w_router)) for p in router.parameters("")}


def route(
    home: Backend,
    moe: MoeConfig,
    x: Any,
    w_router: np.ndarray | None = None,
    state: Mapping[str, np.ndarray] | None = None,
    **fields: Any,
) -> Routed:
    """Route x (T, D). `fields`: of Tokens; `layer` and the other places of RouterContext."""
    ops, x = home.ops, np.array(x, np.float64)
    place = {n: fields.pop(n) for n in ("layer", "seed", "vocab_size", "comm", "group") if n in fields}
    router = make_router(context(ops, moe, x.shape[1], **place))
    memo = Memo(router.initial_state() if state is None else state)
    params = values_of(ops, router, w_router)
    return on_host(ops, router.route(params, ops.asarray(x), tokens(ops, len(x), **fields), memo))


def gate_logits(home: Backend, moe: MoeConfig, logits: Any, **fields: Any) -> Routed:
    """Logits straight into the gate: an identity as router weight."""
    logits = np.array(logits, np.float64)
    return route(home, moe, logits, np.eye(logits.shape[1]), **fields)


def gradients(home: Backend, fn: Callable[..., Any], *inputs: Any) -> tuple[float, list[np.ndarray]]:
    """(value, gradient of each floating input) of fn(ops, *inputs) -> one number."""
    arrays = [np.array(x) for x in inputs]
    found = adapter_of(home.name).evaluate(home.ops, fn, arrays, lambda i, value: np.ones(value.shape))
    return float(found.values[0]), found.grads


def loss_gradients(
    home: Backend, moe: MoeConfig, name: str, x: Any, w_router: np.ndarray | None = None, **fields: Any
) -> tuple[float, list[np.ndarray]]:
    """A loss of a router, and its gradients in x and (if given) w_router."""
    number, width = np.shape(x)

    def fn(ops: Any, x_TD: Any, *weights: Any) -> Any:
        router = make_router(context(ops, moe, width))
        params = {"w_router": weights[0]} if weights else {}
        return router.route(params, x_TD, tokens(ops, number, **fields), Memo(router.initial_state())).losses[name]

    return gradients(home, fn, np.array(x, np.float64), *([] if w_router is None else [w_router]))


def finite_differences(fn: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """Central differences of a function of one array."""
    x, found = np.array(x, np.float64), np.zeros(np.shape(x))
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        found[i] = (fn(up) - fn(down)) / (2 * h)
    return found


def layer_output(home: Backend, routed: Routed, x: Any, a: Any) -> np.ndarray:
    """y of a layer on one rank whose expert e multiplies by a[e]: dispatch, scale, combine."""
    ops, num_experts = home.ops, len(a)
    transport = Local(ops, num_experts)
    rows, exchange = transport.dispatch(ops.asarray(np.array(x, np.float64)), routed.device, None)
    counts = ops.to_numpy(exchange.counts_C)
    scale = np.zeros((rows.shape[0], 1))
    scale[: counts.sum(), 0] = np.repeat(np.asarray(a, np.float64), counts)
    return ops.to_numpy(transport.combine(rows * ops.asarray(scale), routed.device.weights_TK, exchange))


def host_softmax(z: Any) -> np.ndarray:
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
