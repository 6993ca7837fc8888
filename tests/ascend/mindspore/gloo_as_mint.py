"""`mint.distributed` as `HcclWire` uses it, over gloo: every call is bound to the real function's signature first."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mindspore import Tensor, mint

REAL: Any = mint.distributed


def like_the_real_one(method: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a call that mint.distributed would refuse."""

    def bound(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(getattr(REAL, method.__name__)).bind(*args, **kwargs)
        given.apply_defaults()
        return method(self, **given.arguments)

    return bound


@dataclass
class Operation:
    """A P2POp that can be made without a device."""

    op: str
    tensor: Tensor
    peer: int
    group: Any


class GlooAsMint:
    """The functions in place, as over HCCL; groups are made by their members alone."""

    def __init__(self) -> None:
        self.groups: dict[str, Any] = {}

    @like_the_real_one
    def new_group(self, ranks: list[int], **options: Any) -> str:
        assert options["pg_options"] is None
        name = f"hccl_{'_'.join(map(str, ranks))}"
        assert name not in self.groups, "the same ranks need no second communicator"
        self.groups[name] = dist.new_group(ranks, use_local_synchronization=True)
        return name

    @like_the_real_one
    def barrier(self, group: str | None, **_: Any) -> None:
        dist.barrier(self._of(group))

    @like_the_real_one
    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_split_sizes: Any, input_split_sizes: Any, group: str, **_: Any
    ) -> None:
        y = lend(output)
        dist.all_to_all_single(y, lend(input), output_split_sizes, input_split_sizes, self._of(group))
        put(output, y)

    @like_the_real_one
    def all_gather_into_tensor(self, output_tensor: Tensor, input_tensor: Tensor, group: str, **_: Any) -> None:
        y = lend(output_tensor)
        dist.all_gather_into_tensor(y, lend(input_tensor), self._of(group))
        put(output_tensor, y)

    @like_the_real_one
    def reduce_scatter_tensor(self, output: Tensor, input: Tensor, op: str, group: str, **_: Any) -> None:
        assert op == "sum"
        y = lend(output)
        dist.reduce_scatter_tensor(y, lend(input), group=self._of(group))
        put(output, y)

    @like_the_real_one
    def all_reduce(self, tensor: Tensor, op: str, group: str, **_: Any) -> None:
        assert op == "sum"
        y = lend(tensor)
        dist.all_reduce(y, group=self._of(group))
        put(tensor, y)

    @like_the_real_one
    def broadcast(self, tensor: Tensor, src: int, group: str, **_: Any) -> None:
        y = lend(tensor)
        dist.broadcast(y, src, self._of(group))
        put(tensor, y)

    @like_the_real_one
    def P2POp(self, op: str, tensor: Tensor, peer: int, group: str, **_: Any) -> Operation:
        assert op in ("isend", "irecv")
        return Operation(op, tensor, peer, group)

    @like_the_real_one
    def batch_isend_irecv(self, p2p_op_list: list[Operation]) -> list[Any]:
        assert p2p_op_list, "an empty list is refused"
        pairs = [(o.op, o.peer) for o in p2p_op_list]
        assert len(set(pairs)) == len(pairs), "HCCL takes one block per ordered pair and call"
        memory = [lend(o.tensor) for o in p2p_op_list]
        kinds = {"isend": dist.isend, "irecv": dist.irecv}
        works = dist.batch_isend_irecv(
            [dist.P2POp(kinds[o.op], m, o.peer, self._of(o.group)) for o, m in zip(p2p_op_list, memory, strict=True)]
        )
        for work in works:
            work.wait()
        for o, m in zip(p2p_op_list, memory, strict=True):
            if o.op == "irecv":
                put(o.tensor, m)
        return []

    def _of(self, group: str | None) -> Any:
        return None if group is None else self.groups[group]


def lend(x: Tensor) -> torch.Tensor:
    assert x.is_contiguous()
    return torch.from_numpy(np.array(x.asnumpy()))


def put(x: Tensor, value: torch.Tensor) -> None:
    if x.size:
        x.copy_(Tensor.from_numpy(value.numpy()))
