"""LAER's layouts: how many replicas each expert gets, and on which ranks they rest (arXiv 2602.11686).

Both depend on the column sums of the counts alone. Ties: the larger load, then the lower expert or rank id.
"""

from __future__ import annotations

import numpy as np

from .compiled import jit


@jit
def heap_replicas(load_E: np.ndarray, num_slots: int, nodes: int) -> np.ndarray:
    """(E,) replicas, at least 1 each, num_slots in all: again and again one step to the largest load / replicas.

    A step is one replica per node once an expert has that many, else one. Every expert starts with one per node
    where the slots suffice, else with one. An expert whose step no longer fits is closed; slots that remain when
    all are closed go out one by one.
    """
    start = nodes if nodes * load_E.size <= num_slots else 1
    replicas_E = np.full(load_E.size, start, np.int64)
    closed_E = np.zeros(load_E.size, np.bool_)
    left = num_slots - start * load_E.size
    while left > 0:
        top = _neediest(load_E, replicas_E, closed_E)
        if top < 0:
            nodes = 1
            closed_E[:] = False
            continue
        step = nodes if replicas_E[top] >= nodes else 1
        if step > left:
            closed_E[top] = True
        else:
            replicas_E[top] += step
            left -= step
    return replicas_E


@jit
def _neediest(load_E: np.ndarray, replicas_E: np.ndarray, closed_E: np.ndarray) -> int:
    """Open expert with the largest load / replicas, compared in integers; -1 if all are closed."""
    top = -1
    for e in range(load_E.size):
        if closed_E[e]:
            continue
        if top < 0:
            top = e
            continue
        mine = load_E[e] * replicas_E[top]
        best = load_E[top] * replicas_E[e]
        if mine > best or (mine == best and load_E[e] > load_E[top]):
            top = e
    return top


def even_replicas(num_experts: int, num_slots: int) -> np.ndarray | None:
    """(E,) the same number for all; None where it does not divide."""
    share, rest = divmod(num_slots, num_experts)
    return None if rest else np.full(num_experts, share, np.int64)


def place(load_E: np.ndarray, replicas_E: np.ndarray, slots_per_rank: int, node_R: np.ndarray) -> np.ndarray:
    """(R, C) expert of each slot, ascending on a rank, -1 last where replicas are fewer than slots.

    Replicas go out by load / replicas, largest first: to the nodes with the fewest replicas of the expert among
    those with a free slot, there to the rank with the lowest accumulated load. ValueError if they do not fit.
    """
    if int(replicas_E.sum()) > slots_per_rank * len(node_R):
        raise ValueError(
            f"{int(replicas_E.sum())} replicas do not fit {len(node_R)} ranks x {slots_per_rank} slots; "
            "raise the number of slots per rank"
        )
    share_E = _fixed_point(load_E, replicas_E)
    visit_E = np.lexsort((np.arange(len(load_E)), -load_E, -share_E))
    nodes, node_R = np.unique(node_R, return_inverse=True)
    by_node = np.argsort(node_R, kind="stable")
    first_N = np.searchsorted(node_R[by_node], np.arange(len(nodes) + 1))
    slots_RC = np.full((len(node_R), slots_per_rank), -1, np.int64)
    _place(share_E, replicas_E, visit_E, by_node, first_N, slots_RC)
    padding_last = np.where(slots_RC < 0, len(load_E), slots_RC)
    padding_last.sort(axis=1)
    return np.where(padding_last == len(load_E), -1, padding_last)


def _fixed_point(load_E: np.ndarray, replicas_E: np.ndarray) -> np.ndarray:
    """load / replicas times one power of two, rounded down: integers whose sums stay below 2^62."""
    shift = max(0, min(30, 61 - int(load_E.sum()).bit_length()))
    return (load_E << shift) // np.maximum(replicas_E, 1)


@jit
def _place(
    share_E: np.ndarray,
    replicas_E: np.ndarray,
    visit_E: np.ndarray,
    by_node: np.ndarray,
    first_N: np.ndarray,
    slots_RC: np.ndarray,
) -> None:
    """Fill slots_RC. by_node: ranks sorted by node, node n's being by_node[first_N[n]:first_N[n + 1]]."""
    nodes = first_N.size - 1
    load_R = np.zeros(slots_RC.shape[0], np.int64)
    used_R = np.zeros(slots_RC.shape[0], np.int64)
    best_N = by_node[first_N[:-1]]
    held_N = np.zeros(nodes, np.int64)
    for e in visit_E:
        held_N[:] = 0
        for _ in range(replicas_E[e]):
            chosen = -1
            for n in range(nodes):
                if best_N[n] < 0:
                    continue
                if chosen >= 0:
                    here, there = best_N[n], best_N[chosen]
                    if held_N[n] > held_N[chosen]:
                        continue
                    if held_N[n] == held_N[chosen] and (load_R[here], here) > (load_R[there], there):
                        continue
                chosen = n
            rank = best_N[chosen]
            slots_RC[rank, used_R[rank]] = e
            used_R[rank] += 1
            load_R[rank] += share_E[e]
            held_N[chosen] += 1
            best_N[chosen] = _lowest(by_node[first_N[chosen] : first_N[chosen + 1]], load_R, used_R, slots_RC.shape[1])


@jit
def _lowest(ranks: np.ndarray, load_R: np.ndarray, used_R: np.ndarray, slots_per_rank: int) -> int:
    """The rank with a free slot and the lowest load, ties by id; -1 if all are full."""
    best = -1
    for rank in ranks:
        if used_R[rank] < slots_per_rank and (best < 0 or load_R[rank] < load_R[best]):
            best = rank
    return best
