"""Searches beside the step give the layouts of the plain loop, however late they are."""

import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import pytest
from twinmoe.moe_core.planners import relayout
from twinmoe.moe_core.planners.background import BackgroundSearch
from twinmoe.moe_core.planners.layout import tiled_layout
from twinmoe.moe_core.planners.relayout import RelayoutOptions


def counts(call: int) -> np.ndarray:
    rng = np.random.default_rng(call // 2)
    return rng.multinomial(500, rng.dirichlet(np.full(6, 0.3)), 4).astype(np.int64)


@pytest.mark.parametrize("lag", [1, 3])
def test_the_same_layouts_as_in_the_plain_loop_and_after_a_restart(lag):
    options = RelayoutOptions(2, lag=lag)
    state = relayout.start(tiled_layout(6, 4, 2), 6, options)
    with ThreadPoolExecutor(1) as pool:
        search = BackgroundSearch(state, options, pool)
        for call in range(10):
            layout, waited = search.layout()
            assert waited >= 0
            np.testing.assert_array_equal(layout.slots, relayout.next_layout(state).slots)
            search.observe(counts(call))
            state = relayout.advance(state, counts(call), options)
            if call == 5:
                search = BackgroundSearch(search.state(), options, pool)
        np.testing.assert_array_equal(search.state().layouts, state.layouts)
        np.testing.assert_array_equal(search.state().window, state.window)


class Late(Executor):
    """Runs each search only after a while, in a thread of its own."""

    def submit(self, fn, /, *args, **kwargs):
        future: Future = Future()
        threading.Timer(0.05, lambda: future.set_result(fn(*args, **kwargs))).start()
        return future


def test_a_late_search_is_waited_for_and_the_wait_is_told():
    options = RelayoutOptions(2)
    search = BackgroundSearch(relayout.start(tiled_layout(6, 4, 2), 6, options), options, Late())
    assert search.layout()[1] == 0
    search.observe(counts(0))
    layout, waited = search.layout()
    assert waited > 0
    expected = relayout.advance(relayout.start(tiled_layout(6, 4, 2), 6, options), counts(0), options)
    np.testing.assert_array_equal(layout.slots, relayout.next_layout(expected).slots)


def test_what_a_search_raises_arrives_at_the_call():
    options = RelayoutOptions(2)
    with ThreadPoolExecutor(1) as pool:
        search = BackgroundSearch(relayout.start(tiled_layout(6, 4, 2), 6, options), options, pool)
        broken = counts(0)
        search._options = RelayoutOptions(2, node_of=(0,))
        search.observe(broken)
        with pytest.raises(ValueError, match="one node per rank"):
            search.layout()
