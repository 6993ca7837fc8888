"""A layer in somebody else's loop on the tape: gradients of the mean over ranks, norms, names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends.protocol import Component, Launch, Parameter, Piece
from twinmoe.backends.reference import comm, ops, trainer
from twinmoe.backends.reference.interop import ReferenceLayerModule
from twinmoe.backends.reference.tape import Var, grad, variable

TOKENS = [[(1, 0), (2, 1)], [(4, 0), (8, 1)], [(16, 0), (32, 1)], [(64, 0), (128, 1)]]
"""(x, expert) of each rank's two tokens."""
SCALES = np.array([3.0, 5.0])


def scaling_layer(c: comm.Communicator, placement: tuple[int, int]) -> tuple[ReferenceLayerModule, Any]:
    """y = a[e] x with one expert a rank, pairs of ranks as expert groups; placement[i]: expert of member i."""
    pairs = [[r, r + 1] for r in range(0, c.size, 2)]
    columns = [list(range(i, c.size, 2)) for i in range(2)]
    groups = {"world": c.group("world", [list(range(c.size))])}
    groups |= {"expert": c.group("expert", pairs), "expert_data": c.group("expert_data", columns)}
    mine = placement[groups["expert"].index]
    weight = Parameter(
        "w",
        (1, 1, 1),
        lambda: SCALES[mine].reshape(1, 1, 1),
        reduce_over="expert_data",
        norm_over="expert",
        pieces=(Piece(f"experts.{mine}.w", (1, 1)),),
    )

    def forward(p: Any, x: Var, send: list[int], receive: list[int]) -> Var:
        rows = c.all_to_all(x, groups["expert"], send, receive)
        out = ops.grouped_matmul(rows, p["w"], ops.asarray(np.array([rows.shape[0]])))
        return c.all_to_all(out, groups["expert"], receive, send)

    return trainer.module(Component("layer", (weight,), forward), groups, c), mine


@pytest.mark.parametrize("placement", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("ranks", "right"), [(2, [1.25, 2.5]), (4, [10.625, 21.25])])
def test_expert_gradients_are_those_of_the_mean_over_all_ranks(
    ranks: int, right: list[float], placement: tuple[int, int]
) -> None:
    def fn(c: comm.Communicator) -> tuple[int, float, float]:
        layer, mine = scaling_layer(c, placement)
        rows = sorted(TOKENS[c.rank], key=lambda token: placement.index(token[1]))
        shared = variable(np.array([1.0]))
        y = layer(ops.asarray(np.array([[float(x)] for x, _ in rows])), [1, 1], [1, 1])
        (d_expert, d_shared) = grad((y * shared).mean(0), [*layer.expert_parameters(), shared])
        (synced,) = layer.sync_gradients([d_expert])
        averaged = c.all_reduce(Var(d_shared), c.group("all", [list(range(ranks))])).value / ranks
        return mine, float(synced.item()), float(averaged.item())

    for mine, d_expert, d_shared in comm.run_ranks(ranks, fn):
        assert d_expert == pytest.approx(right[mine], rel=1e-12)
        assert d_shared == pytest.approx({2: 16.25, 4: 138.125}[ranks], rel=1e-12)


def test_the_norm_counts_experts_of_all_layers_once() -> None:
    def fn(c: comm.Communicator) -> Any:
        first, mine = scaling_layer(c, (0, 1))
        second, _ = scaling_layer(c, (0, 1))
        model = [variable(np.zeros(3)), first, second]
        expert = np.full((1, 1, 1), [4.0, 12.0][mine])
        return first.clip_grad_norm(model, 6.5, [np.array([1.0, 2, 2]), expert, np.zeros((1, 1, 1))])

    for size in (2, 4):
        for rank, (clipped, norm) in enumerate(comm.run_ranks(size, fn)):
            assert norm == 13.0
            assert [g.ravel().tolist() for g in clipped] == [[0.5, 1.0, 1.0], [[2.0], [6.0]][rank % 2], [0.0]]


def test_state_is_named_by_logical_expert() -> None:
    names = comm.run_ranks(2, lambda c: scaling_layer(c, (1, 0))[0].layer_state_dict())
    assert [{name: v.tolist() for name, v in found.items()} for found in names] == [
        {"experts.1.w": [[5.0]]},
        {"experts.0.w": [[3.0]]},
    ]


def test_gradients_must_be_passed() -> None:
    alone = comm.connect(Launch())
    layer = trainer.module(Component("empty", (), lambda p: None), {}, alone)
    layer.exclude_experts([])
    with pytest.raises(ValueError, match="pass those of expert_parameters"):
        layer.sync_gradients()
    with pytest.raises(ValueError, match="pass those of the model's leaves"):
        layer.clip_grad_norm([], 1.0)
