"""Which rank takes how many rows of which expert: LLEP's least-loaded assignment (arXiv 2601.17111, Alg. 2-3).

Differences from the pseudo-code, all in integers: the cap is rounded up, so that with min_rows = 1 and no limit
on borrowing nobody exceeds it; pieces of one expert on one rank are merged; what no helper may take stays
with ranks that hold the expert.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiled import jit


class SpillRule(NamedTuple):
    """Numbers of one assignment.

    cap: rows that a rank should not exceed; near, far: smallest piece for a helper on the owner's node and
    elsewhere; finish: a smaller piece is fine when it finishes the expert. What no helper takes stays with the owner,
    unless force: all of it goes to the least loaded helper, or spread: it is levelled over the expert's holders.
    """

    cap: int
    near: int
    far: int
    finish: bool
    force: bool
    spread: bool


@jit
def assign(
    load_E: np.ndarray,
    owner_E: np.ndarray,
    visit_E: np.ndarray,
    node_R: np.ndarray,
    limit_R: np.ndarray,
    rule: SpillRule,
) -> tuple[np.ndarray, np.ndarray]:
    """(rows_ER, turn_ER): rows of each expert on each rank; 1, 2, ... for helpers in the order they were chosen.

    load_E: rows of each expert; visit_E: experts in the order in which they are placed; limit_R: foreign experts
    that each rank may hold. A rank's level counts what it was given and the experts of its own not yet placed,
    so nothing is sent to a rank that is about to be filled by its own experts.
    """
    rows_ER = np.zeros((load_E.size, node_R.size), np.int64)
    turn_ER = np.zeros((load_E.size, node_R.size), np.int64)
    level_R = np.zeros(node_R.size, np.int64)
    free_R = limit_R.copy()
    for e in range(load_E.size):
        level_R[owner_E[e]] += load_E[e]
    for e in visit_E:
        owner = owner_E[e]
        kept = min(load_E[e], max(0, rule.cap - (level_R[owner] - load_E[e])))
        rest = load_E[e] - kept
        rows_ER[e, owner] = kept
        level_R[owner] -= rest
        turn = 0
        while rest > 0:
            helper = _choose(rest, owner, turn_ER[e], level_R, free_R, node_R, rule)
            forced = helper < 0 and rule.force
            if forced:
                helper = _least_loaded(owner, level_R)
            if helper < 0:
                break
            piece = rest if forced else min(rest, rule.cap - level_R[helper])
            if turn_ER[e, helper] == 0:
                turn += 1
                turn_ER[e, helper] = turn
                free_R[helper] -= 1
            rows_ER[e, helper] += piece
            level_R[helper] += piece
            rest -= piece
        if rest > 0:
            _keep(rest, owner, rows_ER[e], turn_ER[e], level_R, rule)
    return rows_ER, turn_ER


@jit
def _choose(
    rest: int,
    owner: int,
    turn_R: np.ndarray,
    level_R: np.ndarray,
    free_R: np.ndarray,
    node_R: np.ndarray,
    rule: SpillRule,
) -> int:
    """The helper for the next piece, or -1: the owner's node first, then the lower level, then the lower id."""
    best = -1
    best_far = False
    for h in range(level_R.size):
        if h == owner or (turn_R[h] == 0 and free_R[h] <= 0):
            continue
        piece = min(rest, rule.cap - level_R[h])
        far = node_R[h] != node_R[owner]
        if piece <= 0 or (piece < (rule.far if far else rule.near) and not (rule.finish and piece == rest)):
            continue
        if best < 0 or (best_far and not far) or (best_far == far and level_R[h] < level_R[best]):
            best = h
            best_far = far
    return best


@jit
def _least_loaded(owner: int, level_R: np.ndarray) -> int:
    """The rank with the lowest level that is not the owner, room or not; -1 if there is none."""
    best = -1
    for h in range(level_R.size):
        if h != owner and (best < 0 or level_R[h] < level_R[best]):
            best = h
    return best


@jit
def _keep(rest: int, owner: int, rows_R: np.ndarray, turn_R: np.ndarray, level_R: np.ndarray, rule: SpillRule) -> None:
    """Rows that no helper takes: to the owner, or filled into all holders of the expert from the lowest level up."""
    if not rule.spread:
        rows_R[owner] += rest
        level_R[owner] += rest
        return
    while rest > 0:
        lowest = level_R[owner]
        for h in range(level_R.size):
            if turn_R[h] > 0 and level_R[h] < lowest:
                lowest = level_R[h]
        next_level = lowest + rest
        width = 0
        for h in range(level_R.size):
            if h == owner or turn_R[h] > 0:
                if level_R[h] == lowest:
                    width += 1
                elif level_R[h] < next_level:
                    next_level = level_R[h]
        poured = min(rest, (next_level - lowest) * width)
        share = poured // width
        extra = poured - share * width
        for h in range(level_R.size):
            if (h == owner or turn_R[h] > 0) and level_R[h] == lowest:
                piece = share + (1 if extra > 0 else 0)
                extra -= 1
                rows_R[h] += piece
                level_R[h] += piece
        rest -= poured
