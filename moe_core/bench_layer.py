"""`twinmoe bench layer`: one MoE layer on one device, forward and backward, fused operations beside plain ones.

Plain: experts and weighted sums made of the contract's elementary operations (grouped products, sigmoid, rows by
index), each a step of its own. Where a backend's fused operation declines (a dtype, a width), both are the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from ..backends.protocol import Array, Component, DType, Launch, Ops, Parameter, TrainOptions
from ..backends.registry import Backend
from .build import LayerSpec, Runtime, build_layer, make_runtime
from .combinations import ConfigError
from .compose import load_config
from .config import Config
from .mesh import Mesh
from .plain_ops import contract_of, plain_ops, replaced
from .planning import layer_shape
from .routing.base import Memo, Tokens
from .synthetic import ScriptedRouter, Skew, choose
from .transformer import scoped
from .transport.hierarchical import BYTES

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "few-experts": {
        "model": {"hidden_size": 256},
        "moe": {"num_experts": 8, "top_k": 2, "expert_hidden_size": 256},
    },
    "many-experts": {
        "model": {"hidden_size": 256},
        "moe": {"num_experts": 64, "top_k": 8, "expert_hidden_size": 64},
    },
}
"""Layers with a name of their own: as many floating-point operations each."""
WARM_UP = 2


@dataclass(frozen=True)
class LayerRequest:
    """configs: names of SHAPES, or packaged names or paths, whose layer is taken. skew: of scripted choices (None: the
    router's own on random tokens); plain: measure plain operations too; optimizer: time AdamW's step too, whose state
    takes two more copies of the weights."""

    configs: tuple[str, ...] = tuple(SHAPES)
    tokens: int = 2048
    dtype: DType = "float32"
    skew: str | None = None
    repeats: int = 9
    plain: bool = True
    optimizer: bool = False


@dataclass
class Contender:
    """One layer, ready to run. seconds: of each timed call."""

    name: str
    state: Any
    forward: Callable[[], Any]
    loss: Callable[[], tuple[Array, Any]]
    activation_bytes: int
    parameters: int
    peak: int | None = None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"forward": [], "both": [], "optimizer": []})


def run(backend: Backend, request: LayerRequest) -> dict[str, Any]:
    """Medians over `repeats` interleaved calls. Returns {rows: [...], backend, dtype, tokens}; a row has

    shape, ops (fused or plain), num_experts, top_k, hidden_size, expert_hidden_size, forward_milliseconds,
    milliseconds (forward and backward), least and most milliseconds, microseconds_per_row (of both, for each token's
    copy), teraflops (of both, experts' products alone), optimizer_milliseconds (None unless asked), parameters,
    copy_seconds_per_gib (rows into another order),
    activation_bytes (floating arrays that operations returned in a forward pass) and peak_memory_bytes (of a device,
    above what the layer itself holds; None on a host, whose processes keep what they once had).
    ConfigError for an unknown config or skew.
    """
    layers = {name: load_config(SHAPES.get(name, name)) for name in request.configs}
    rows = [row for name, config in layers.items() for row in _measure(backend, request, name, config)]
    return {"rows": rows, "backend": backend.name, "dtype": request.dtype, "tokens": request.tokens}


def precision(name: str) -> DType:
    """ConfigError unless it is one that a layer computes in."""
    if name not in ("float64", "float32", "bfloat16"):
        raise ConfigError(f"--dtype {name} is unknown; choose float32, bfloat16 or float64")
    return cast(DType, name)


def _measure(backend: Backend, request: LayerRequest, name: str, config: Config) -> list[dict[str, Any]]:
    kinds = ["fused"]
    if request.plain and config.moe.activation == "swiglu":  # the contract has no error function for a plain gelu
        kinds.append("plain")
    made = [_contender(backend, request, config, kind) for kind in kinds]
    for turn in range(request.repeats + WARM_UP):
        for contender in made:
            _call(backend, contender, timed=turn >= WARM_UP)
    for contender in made if backend.devices is not None else []:
        contender.peak = _peak(backend, contender)
    copied = _copy_seconds(backend, request, config)
    return [{**_row(request, name, config, contender), "copy_seconds_per_gib": copied} for contender in made]


def _contender(backend: Backend, request: LayerRequest, config: Config, kind: str) -> Contender:
    counter = ByteCounter(backend.ops)
    ops = plain_ops(counter.ops) if kind == "plain" else counter.ops
    comm = backend.comm.connect(Launch())
    runtime = make_runtime(ops, comm, Mesh(), config.parallel, config.cluster)
    component = _component(runtime, request, config)
    options = TrainOptions(dtype=request.dtype, optimizer="adamw" if request.optimizer else "sgd")
    state = backend.trainer.build([component], options, runtime.groups, comm)
    rng = np.random.default_rng(1)
    shape = (request.tokens, config.model.hidden_size)
    d_y = ops.cast(ops.asarray(rng.standard_normal(shape).astype(np.float32)), request.dtype)

    def loss() -> tuple[Array, Any]:
        out = state.modules["moe"]()
        return ops.cast((out.y * d_y).sum(-1), "float32").sum(-1), None

    forward = state.modules["moe"]
    counter.counts = True
    backend.trainer.evaluate(state, forward)
    counter.counts = False
    parameters = sum(int(np.prod(p.shape)) for p in component.parameters)
    return Contender(kind, state, forward, loss, counter.bytes, parameters)


def _component(runtime: Runtime, request: LayerRequest, config: Config) -> Component:
    """The layer on random tokens, which are a parameter: their gradient is part of backward."""
    moe, width, prefix = config.moe, config.model.hidden_size, "layers.0.moe."
    router = None
    if request.skew is not None:
        skew = Skew.parse(request.skew)
        skew.check(moe.num_experts, moe.top_k)
        ids = choose(skew, moe.num_experts, request.tokens, moe.top_k, 1)
        router = ScriptedRouter(runtime.ops, width, moe.top_k, ids)
    parts = build_layer(moe, config.parallel, runtime, LayerSpec(width, prefix, router=router, vocab_size=257))
    x_TD = np.random.default_rng(0).standard_normal((request.tokens, width))
    name = "tokens"
    tokens_parameter = Parameter(name, x_TD.shape, lambda: x_TD.astype(np.float32))
    ids_T = runtime.ops.asarray(np.arange(request.tokens) % 257)
    tokens = Tokens(1, float(request.tokens), token_ids_T=ids_T, domains_S=np.zeros(1, np.int64))

    def forward(params: Mapping[str, Array]) -> Any:
        return parts.layer(scoped(params, prefix), params[name], tokens, Memo())

    return Component("moe", (*parts.parameters, tokens_parameter), forward)


def _call(backend: Backend, contender: Contender, timed: bool) -> None:
    trainer = backend.trainer
    taken = []
    for work in (
        lambda: trainer.evaluate(contender.state, contender.forward),
        lambda: trainer.accumulate(contender.state, contender.loss),
        lambda: trainer.step(contender.state, 0.0),
    ):
        trainer.synchronize()
        began = time.perf_counter()
        work()
        trainer.synchronize()
        taken.append(time.perf_counter() - began)
    if timed:
        for name, seconds in zip(contender.seconds, taken, strict=True):
            contender.seconds[name].append(seconds)


def _peak(backend: Backend, contender: Contender) -> int:
    trainer = backend.trainer
    trainer.peak_memory(reset=True)
    before = trainer.peak_memory()
    trainer.accumulate(contender.state, contender.loss)
    peak = trainer.peak_memory() - before
    trainer.step(contender.state, 0.0)
    return max(0, peak)


def _copy_seconds(backend: Backend, request: LayerRequest, config: Config) -> float:
    """Seconds to bring 1 GiB of rows into another order: what an exchange does on each side besides sending."""
    ops, rows = backend.ops, request.tokens * config.moe.top_k
    rng = np.random.default_rng(2)
    x_ND = ops.cast(
        ops.asarray(rng.standard_normal((rows, config.model.hidden_size)).astype(np.float32)), request.dtype
    )
    order = ops.asarray(rng.permutation(rows))
    taken = []
    for _ in range(request.repeats + WARM_UP):
        backend.trainer.synchronize()
        began = time.perf_counter()
        ops.take_rows(x_ND, order)
        backend.trainer.synchronize()
        taken.append(time.perf_counter() - began)
    size = rows * config.model.hidden_size * BYTES[request.dtype]
    return statistics.median(taken[WARM_UP:]) * 2**30 / size


def _row(request: LayerRequest, name: str, config: Config, contender: Contender) -> dict[str, Any]:
    moe, both = config.moe, [1e3 * s for s in contender.seconds["both"]]
    copies, width = request.tokens * moe.top_k, config.model.hidden_size
    flops = 3.0 * layer_shape(moe, width, BYTES[request.dtype]).row_flops  # backward is twice forward
    updates = 1e3 * statistics.median(contender.seconds["optimizer"])
    return {
        "shape": name,
        "ops": contender.name,
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "hidden_size": config.model.hidden_size,
        "expert_hidden_size": moe.expert_hidden_size,
        "forward_milliseconds": 1e3 * statistics.median(contender.seconds["forward"]),
        "milliseconds": statistics.median(both),
        "least": min(both),
        "most": max(both),
        "microseconds_per_row": 1e3 * statistics.median(both) / copies,
        "teraflops": flops * copies / statistics.median(both) / 1e9,
        "optimizer_milliseconds": updates if request.optimizer else None,
        "parameters": contender.parameters,
        "activation_bytes": contender.activation_bytes,
        "peak_memory_bytes": contender.peak,
    }


# --- operations --------------------------------------------------------------------------------
class ByteCounter:
    """Operations that add up the bytes of the floating arrays they return while `counts` is set.

    Arguments that come back (a cast to the same dtype) and parts of other arrays do not count.
    """

    _UNCOUNTED = ("asarray", "to_numpy", "dtype_of", "stop_gradient", "checkpoint", "split")

    def __init__(self, ops: Ops) -> None:
        self._plain, self.bytes, self.counts = ops, 0, False
        watched = {name: self._watched(f) for name, f in contract_of(ops).items() if name not in self._UNCOUNTED}
        self.ops = replaced(ops, watched)

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            for array in result if isinstance(result, tuple) else (result,):
                if self.counts and "float" in str(array.dtype).lower() and array is not arguments[0]:
                    self.bytes += BYTES[self._plain.dtype_of(array)] * int(np.prod(array.shape))
            return result

        return call
