"""Plans do not depend on numba: the same bytes with and without it."""

import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, sys
if sys.argv[1] == "without":
    sys.modules["numba"] = None
import numpy as np
from twinmoe.moe_core.planners.compiled import COMPILED
from twinmoe.moe_core.planners.layout import tiled_layout
from twinmoe.moe_core.planners.least_loaded import (
    LeastLoadedOptions, plan_least_loaded, plan_least_loaded_sharded)
from twinmoe.moe_core.planners.relayout import RelayoutOptions, plan_relayout, solve
from twinmoe.moe_core.planners.static import owners, slot_table

digest = hashlib.sha256()
def add(plan):
    for part in (plan.slots, plan.weight_from, plan.flow, plan.round, *plan.order):
        digest.update(np.ascontiguousarray(part).tobytes() + part.dtype.str.encode())

rng = np.random.default_rng(0)
for case in range(24):
    ranks, experts = int(rng.integers(1, 17)), int(rng.integers(1, 65))
    shares = rng.dirichlet(np.full(experts, 0.1))
    counts = np.stack([rng.multinomial(n, shares) for n in rng.integers(0, 900, ranks)]).astype(np.int64)
    table = slot_table(owners(experts, ranks), ranks)
    nodes = tuple((np.arange(ranks) // 4).tolist())
    for rule in ("prose", "pseudocode"):
        for order in ("global", "source_first"):
            options = LeastLoadedOptions(lambda_=None, min_rows=1 + case % 20, min_rows_far=9, small_remainder=rule,
                spill_order=order, node_of=nodes, max_borrowed=(None, 1, 2)[case % 3])
            add(plan_least_loaded(counts, table, options))
            add(plan_least_loaded_sharded(counts, table, table.shape[1] + case % 3, options))
    slots = table.shape[1] + 1
    moving = RelayoutOptions(slots, nodes, rotate=bool(case % 2))
    layout = solve(counts, tiled_layout(experts, ranks, slots), moving)
    add(plan_relayout(counts, layout, moving))
    add(plan_relayout(counts, layout, moving, table))
print(COMPILED, digest.hexdigest())
"""


def digest(how: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    compiled, value = done.stdout.split()
    return compiled, value


def test_same_bytes_with_and_without_numba():
    pytest.importorskip("numba")
    (compiled, with_numba), (plain, without) = digest("with"), digest("without")
    assert (compiled, plain) == ("True", "False")
    assert with_numba == without


def test_static_plans_do_not_load_numba():
    program = "import sys, twinmoe.moe_core.planning; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "False", done.stderr
