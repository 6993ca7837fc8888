"""What a backend must offer: `ops`, `comm` and `trainer`, modules or objects of plain functions.

Tensors of a framework are called `Array` here. The core also uses what every framework's tensor has:
`+ - * /` and `@` (with NumPy broadcasting; `// %` on integers, `~ & |` on booleans), comparisons with
tensors and numbers, `.shape`, `.reshape(shape)`, `.sum(axis)` and `.mean(axis)` with one positional
axis, which has at least one element (MindSpore's host returns what lies in memory for none). No indexing.
Everything else goes through these functions. Index tensors are int64 (int32 where a
framework insists); integer and boolean tensors carry no gradient.

Shape suffixes: T tokens on a rank, D width, K experts per token, E experts, R ranks, C slots,
G groups of a grouped matmul, F expert width, N rows after dispatch, S sequences, L their length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Array = Any
"""A tensor of the backend's framework (or a tape variable of the NumPy reference)."""

DType = Literal["float64", "float32", "bfloat16", "float16"]


class Ops(Protocol):
    """Arrays and fused kernels. Differentiable unless the docstring says otherwise."""

    # --- between host and device -------------------------------------------------------------
    def asarray(self, value: np.ndarray) -> Array:
        """Copy a host array to the device. Integers become int64, floats keep their dtype."""
        ...

    def to_numpy(self, x: Array) -> np.ndarray:
        """Copy to the host, without gradient (bfloat16 arrives as float32). Synchronises."""
        ...

    def cast(self, x: Array, dtype: DType) -> Array:
        """Convert to a floating dtype (integers and booleans too); the gradient is converted back."""
        ...

    def dtype_of(self, x: Array) -> DType:
        """Name of a floating tensor's dtype."""
        ...

    def stop_gradient(self, x: Array) -> Array:
        """The same values, cut from the graph."""
        ...

    def checkpoint(self, fn: Callable[..., Any], *args: Array) -> Any:
        """fn(*args), whose intermediates are dropped and computed again in backward."""
        ...

    # --- shape -------------------------------------------------------------------------------
    def concat(self, parts: Sequence[Array], axis: int = 0) -> Array:
        """Join along an axis; parts of length zero are allowed."""
        ...

    def split(self, x: Array, sizes: Sequence[int], axis: int = 0) -> list[Array]:
        """Cut along an axis into pieces of the given host sizes; zeros are allowed."""
        ...

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        """Permute all axes; the result is contiguous."""
        ...

    # --- element by element and along the last axis ------------------------------------------
    def exp(self, x: Array) -> Array: ...
    def log(self, x: Array) -> Array: ...
    def sqrt(self, x: Array) -> Array: ...
    def sigmoid(self, x: Array) -> Array: ...
    def relu(self, x: Array) -> Array: ...

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        """Elements of a where the boolean condition holds, else of b (broadcast; a or b may be a number)."""
        ...

    def softmax(self, x: Array) -> Array:
        """Along the last axis, stable."""
        ...

    def logsumexp(self, x: Array) -> Array:
        """Along the last axis, which disappears; stable."""
        ...

    # --- selecting ---------------------------------------------------------------------------
    def topk(self, scores_TE: Array, k: int) -> Array:
        """Ids (T, k) int64 of the k largest, best first; ties go to the lower id. No gradient.

        NaN counts as minus infinity, and ids of a row are always distinct and in range.
        """
        ...

    def argsort(self, keys_N: Array) -> Array:
        """Stable ascending order of non-negative integers (N,). No gradient."""
        ...

    def invert(self, order_N: Array) -> Array:
        """Inverse of a permutation: invert(order)[order[n]] = n. No gradient."""
        ...

    def count(self, ids: Array, num: int) -> Array:
        """How often each of 0..num-1 occurs, int64 (num,); ids outside that range do not count. No gradient."""
        ...

    def take_along(self, x_TE: Array, ids_TK: Array) -> Array:
        """x[t, ids[t, k]], shape (T, K). The gradient adds where an id repeats."""
        ...

    def take_rows(self, x: Array, index_N: Array) -> Array:
        """Rows x[index] (N, ...); index -1 gives a zero row. The gradient is `sum_rows`. x may be 1-D, or integers."""
        ...

    def sum_rows(self, rows_ND: Array, index_N: Array, num_rows: int) -> Array:
        """Add row n into row index[n] of a zero (num_rows, D); -1 is ignored. Deterministic.

        Sums in at least float32 and in ascending order of n.
        """
        ...

    def combine_rows(self, rows_ND: Array, index_TK: Array, weights_TK: Array) -> Array:
        """y[t] = sum over k, in order, of weights[t, k] * rows[index[t, k]]; index -1 contributes exact zeros.

        Sums in at least float32, result in the dtype of rows. Each row is referenced at most once, so the
        gradient to rows is a gather.
        """
        ...

    # --- compute -----------------------------------------------------------------------------
    def grouped_matmul(self, x_ND: Array, w_GDF: Array, counts_G: Array) -> Array:
        """Row blocks of x, counts[g] rows each, times w[g]; rows after the last block give exact zeros.

        Groups of zero rows are legal and get exactly zero weight gradient.
        """
        ...

    def router_topk(
        self, x_NHD: Array, w_HDE: Array, bias_HE: Array | None, k: int, ids_NHK: Array | None = None
    ) -> tuple[Array, Array]:
        """(logits, ids), both (N, H, k), of H routers: the k largest of x @ w + bias, best first, and their x @ w.

        Ties go to the lower id; NaN counts as minus infinity. Scores, in at least float32, are taken a tile of
        experts at a time: (N, H, E) exists neither forward nor backward. The logits carry gradient to x and w
        (deterministic, zero for experts that nobody chose), none to the bias. ids: these experts instead of the
        best, so that recomputation replays a decision.
        """
        ...

    def expert_mlp(
        self, x_ND: Array, w_up: Array, w_down: Array, counts_G: Array, activation: Literal["swiglu", "gelu"]
    ) -> Array:
        """Grouped feed-forward: act(x @ w_up[g]) @ w_down[g].

        swiglu: w_up is (G, D, 2F), gate columns first, act = silu(gate) * up. gelu: w_up is (G, D, F), exact gelu.
        """
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight along the last axis; statistics in at least float32."""
        ...

    def rotary(self, x_SLHA: Array, cos_1L1A: Array, sin_1L1A: Array) -> Array:
        """x * cos + (-x2, x1) * sin with (x1, x2) the halves of the last axis; in at least float32.

        cos and sin are the same in both halves and get no gradient.
        """
        ...

    def attention(self, q_SLHA: Array, k_SLHA: Array, v_SLHA: Array, allowed: Array | None) -> Array:
        """Causal scaled-dot-product attention, (S, L, H, A); k and v may have fewer heads (grouped queries).

        allowed: None (causal), or boolean (S, L, L), already causal, True where a query (row) may look.
        """
        ...

    def cross_entropy(self, logits_TV: Array, targets_T: Array) -> Array:
        """Negative log-likelihood of each target, (T,), in at least float32."""
        ...


@dataclass(frozen=True)
class Group:
    """A set of ranks that talk to each other. `handle` belongs to the backend."""

    name: str
    ranks: tuple[int, ...]
    index: int
    handle: Any = None

    @property
    def size(self) -> int:
        return len(self.ranks)


class Communicator(Protocol):
    """Collectives of one rank. Every rank of a group must make the same calls in the same order."""

    rank: int
    size: int

    @property
    def no_overlap(self) -> str | None:
        """Why no work can go on during an exchange that was started; None where it can."""
        ...

    def group(self, name: str, partition: Sequence[Sequence[int]]) -> Group:
        """The group of this rank in a partition of all ranks. Collective: all ranks call it alike."""
        ...

    def all_to_all(
        self, x: Array, group: Group, send_splits: Sequence[int] | None = None, recv_splits: Sequence[int] | None = None
    ) -> Array:
        """Rows of x, cut by send_splits (host integers), to the ranks in order; None = equal splits.

        Adjoint: the same exchange with the splits swapped. A rank with nothing to send still takes part.
        """
        ...

    def all_to_all_start(
        self, x: Array, group: Group, send_splits: Sequence[int] | None = None, recv_splits: Sequence[int] | None = None
    ) -> Any:
        """Begin an all_to_all, to be ended by `all_to_all_finish`; other work may go on meanwhile.

        Adjoint: in flight likewise. A backend without asynchronous collectives does all of it here.
        """
        ...

    def all_to_all_finish(self, started: Any) -> Array:
        """What the all_to_all that `all_to_all_start` began has brought. Each is finished exactly once."""
        ...

    def all_gather(self, x: Array, group: Group) -> Array:
        """Equal-shaped blocks joined along axis 0. Adjoint: reduce_scatter."""
        ...

    def reduce_scatter(self, x: Array, group: Group) -> Array:
        """Sum over ranks, block i of axis 0 to rank i. Adjoint: all_gather."""
        ...

    def all_reduce(self, x: Array, group: Group) -> Array:
        """Sum over ranks. Adjoint: all_reduce."""
        ...

    def exchange(
        self, sends: Sequence[tuple[int, Array]], receives: Sequence[tuple[int, Array]], group: Group
    ) -> list[Array]:
        """Batched point-to-point by group index: returns one Array per receive, shaped like its template.

        Matched in order between each pair. No gradient.
        """
        ...

    def gather_to_host(self, x: Array | np.ndarray, group: Group) -> np.ndarray:
        """(size, ...) on every rank's host: one all-gather and one copy to the host. No gradient."""
        ...

    def broadcast(self, x: Array, root: int, group: Group) -> Array:
        """The root's (group index) values. No gradient."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def close(self) -> None:
        """Leave the job in order; nothing may follow."""
        ...


class Comm(Protocol):
    """The communication module of a backend."""

    def connect(self, launch: Launch) -> Communicator:
        """Join the job that `launch` describes."""
        ...


@dataclass(frozen=True)
class Launch:
    """Who this process is, as a launcher said it (`registry.read_launch`).

    agent_store: address:port is served by the launcher's agent (TORCHELASTIC_USE_AGENT_STORE), not by rank 0.
    attempt: restarts so far (TORCHELASTIC_RESTART_COUNT), so that a restarted job does not read stale keys.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500
    timeout_s: float = 600.0
    agent_store: bool = False
    attempt: int = 0


@dataclass(frozen=True)
class Piece:
    """Where a stored value belongs: elements start..stop along `axis` (None: of the flattened tensor) of `name`.

    blocks: the axis is so many equal runs, and start..stop counts inside each (gate and linear columns).
    `shape` is that of the whole logical tensor, `name` its name in checkpoints, whatever the layout.
    """

    name: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int | None = None
    axis: int | None = None
    blocks: int = 1


@dataclass(frozen=True)
class Parameter:
    """One tensor that a rank stores: what a trainer needs to know about it.

    reduce_over: name of the group over which its gradient is summed; norm_over: name of the group whose
    ranks hold disjoint parts (None = every rank holds the same), so that a norm counts each part once.
    master: handed to forward in its stored precision instead of the computation's (router, norms).
    pieces: what each row of axis 0 is (one logical expert a row); empty: the whole is one logical tensor, `name`,
    or the part of it that `part` says.
    """

    name: str
    shape: tuple[int, ...]
    initial: Callable[[], np.ndarray]
    reduce_over: str = "world"
    norm_over: str | None = None
    weight_decay: bool = True
    master: bool = False
    pieces: tuple[Piece, ...] = ()
    part: Piece | None = None


@dataclass(frozen=True)
class Component:
    """A piece of a model: parameters and a pure function forward(parameters by name, *inputs)."""

    name: str
    parameters: tuple[Parameter, ...]
    forward: Callable[..., Any]


@dataclass(frozen=True)
class TrainOptions:
    """Numbers an optimizer and a precision policy need. dtype: of the computation; masters are >= float32."""

    dtype: DType = "float32"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    data_sharding: Literal["none", "full"] = "none"
    optimizer: Literal["adamw", "sgd"] = "adamw"


class LayerModule(Protocol):
    """A component inside somebody else's model, whose loss on each rank is a mean over its own tokens and whose
    replicated gradients are averaged over ranks (DDP, FSDP2). `model` is the module around it."""

    def __call__(self, *inputs: Any, **named: Any) -> Any: ...

    def expert_parameters(self) -> list[Any]:
        """Parameters that differ between ranks: keep them out of DDP and FSDP."""
        ...

    def sync_gradients(self, gradients: Any = None) -> Any:
        """Make the expert gradients those of the mean over ranks: sum over replicas, divide by the ranks.

        In place after backward (torch); MindSpore passes and gets the tuple of `expert_parameters` gradients.
        Frozen parameters (requires_grad False) have none: freeze the same ones on every rank.
        """
        ...

    def clip_grad_norm(self, model: Any, max_norm: float, gradients: Any = None) -> Any:
        """Clip the gradients of `model`, which holds this and other layers; every parameter counts once. -> norm."""
        ...

    def exclude_experts(self, model: Any) -> None:
        """Before a data-parallel wrapper takes `model`: mark the expert parameters as not its business."""
        ...

    def layer_state_dict(self) -> dict[str, np.ndarray]:
        """This rank's parameters by logical name (experts by their id)."""
        ...


class State(Protocol):
    """A model in training: parameters, gradients, optimizer state. Fields belong to the backend."""

    modules: Mapping[str, Callable[..., Any]]
    """Component name -> callable(*inputs): the framework's module."""


class Trainer(Protocol):
    """Parameters, gradients and the optimizer."""

    def build(
        self, components: Sequence[Component], options: TrainOptions, groups: Mapping[str, Group], comm: Communicator
    ) -> State:
        """Make the framework's modules, draw the parameters, prepare the optimizer."""
        ...

    def module(self, component: Component, groups: Mapping[str, Group], comm: Communicator) -> LayerModule:
        """One component as the framework's module (`nn.Module`, `nn.Cell`), for other people's loops."""
        ...

    def accumulate(self, state: State, loss_fn: Callable[[], tuple[Array, Any]]) -> tuple[Array, Any]:
        """Run loss_fn (which calls state.modules), add its gradients to the state's; returns (loss, aux)."""
        ...

    def evaluate(self, state: State, fn: Callable[[], Any]) -> Any:
        """fn() without gradients."""
        ...

    def reduce_gradients(self, state: State) -> None:
        """Sum each gradient over its parameter's `reduce_over` group."""
        ...

    def clip_gradients(self, state: State, max_norm: float | None) -> float:
        """The global norm, each parameter counted once; scales gradients when it exceeds max_norm."""
        ...

    def step(self, state: State, learning_rate: float) -> None:
        """One optimizer update, then gradients are forgotten."""
        ...

    def forget_gradients(self, state: State) -> None:
        """Drop what was accumulated, without an update."""
        ...

    def gradients(self, state: State) -> dict[str, np.ndarray]:
        """Local gradients by parameter name, on the host (zeros where none)."""
        ...

    def tensors(self, state: State) -> Iterator[tuple[str, str, np.ndarray]]:
        """(parameter name, kind, local value): kind is 'parameter', 'exp_avg' or 'exp_avg_sq'."""
        ...

    def load_tensors(self, state: State, values: Iterable[tuple[str, str, np.ndarray]], step: int) -> None:
        """Write local values back in place; `step` = optimizer updates done."""
        ...

    def state_rows(self, state: State, places: Sequence[tuple[str, int]]) -> list[list[Array]]:
        """For each (parameter name, row of axis 0): copies of that row of the parameter and of each tensor that the
        optimizer keeps of it, in the order of `tensors`, on the device. ValueError where the parameter is sharded."""
        ...

    def write_state_rows(
        self, state: State, places: Sequence[tuple[str, int]], rows: Sequence[Sequence[Array]]
    ) -> None:
        """Write rows as `state_rows` gives them, in place; nothing else is copied or changed."""
        ...

    def peak_memory(self, reset: bool = False) -> int:
        """Largest number of bytes held since the last reset (device), or resident set size (host)."""
        ...

    def synchronize(self) -> None:
        """Wait for the device: before reading a clock."""
        ...
