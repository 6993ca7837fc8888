"""LAER's search beside the step: in a thread of the caller's, delivered at its fixed lag whatever the timing."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Executor, Future

import numpy as np

from .layout import Layout
from .relayout import RelayoutOptions, RelayoutState, deliver, next_layout, observe, solve


class BackgroundSearch:
    """One layer's layouts. Per forward call: `layout()`, then `observe(counts)`; recomputation calls neither.

    The layouts equal those of `relayout.advance`: a search that is late is waited for. executor: a thread pool, which
    layers may share; compiled kernels run without the interpreter lock.
    """

    def __init__(self, state: RelayoutState, options: RelayoutOptions, executor: Executor) -> None:
        self._state = state
        self._options = options
        self._executor = executor
        self._searches: deque[Future[Layout]] = deque()

    def layout(self) -> tuple[Layout, float]:
        """(layout of the coming call, seconds waited for it). Raises what the search raised."""
        began = time.perf_counter()
        waited = 0.0
        if not len(self._state.layouts):
            self._deliver_one()
            waited = time.perf_counter() - began
        return next_layout(self._state), waited

    def observe(self, counts_RE: np.ndarray) -> None:
        """After a call with these counts (R, E): start the search for the call `lag` later."""
        if not len(self._state.layouts):
            self._deliver_one()
        self._state, problem = observe(self._state, counts_RE, self._options)
        self._searches.append(self._executor.submit(solve, problem.counts, problem.current, self._options))

    def state(self) -> RelayoutState:
        """The state with every search delivered, for a checkpoint. Waits."""
        while self._searches:
            self._deliver_one()
        return self._state

    def _deliver_one(self) -> None:
        self._state = deliver(self._state, self._searches.popleft().result())
