"""Public bug reports of MoE training as inputs and right values: D1-D14 of the field cases.

Those that need several ranks are scenarios of this folder, run on virtual ranks (the reference) and in processes
(every other backend). The others lie with the code that they are about:

| case | what it is about | tests |
|---|---|---|
| D1  | idle rank and idle expert | here; tests/backends/reference/test_comm.py (the collectives alone) |
| D2  | all tokens to one expert | here (two and four ranks); tests/moe_core/routing/test_capacity.py (table, rounding, float dust); tests/moe_core/planners/test_budget.py (bounded memory) |
| D3  | one capacity for ranks of different length | here; tests/moe_core/routing/test_capacity.py |
| D4  | padding and the balance loss | tests/moe_core/routing/test_losses.py |
| D5  | layers first, factor k | tests/moe_core/routing/test_losses.py |
| D6  | balance loss under accumulation and data parallelism | here (one, two and four ranks); tests/moe_core/routing/test_losses.py |
| D7  | order of softmax and top-k, renormalisation, scaling | tests/moe_core/routing/test_topk.py |
| D8  | groups and a negative bias | tests/moe_core/routing/test_topk.py; (c) and (d) here |
| D9  | expert gradients | here (one layer in our loop); tests/backends/reference/test_interop.py, tests/end_to_end/test_interop.py (other people's loops) |
| D10 | clipping norm | here; tests/backends/reference/test_interop.py |
| D11 | grouped matmul with empty groups | here (numbers, padding); tests/contract/moe_cases.py (laws) |
| D12 | combine | tests/moe_core/routing/test_combine.py; tests/contract/test_ops.py (bits) |
| D13 | NaN token, large logits | here (whole layer); tests/moe_core/routing/test_finite.py, test_losses.py (input B) |
| D14 | uneven all-to-all | tests/contract/test_comm.py (numbers), tests/contract/collective_cases.py (int32, int64, bfloat16); the last line here |
"""  # noqa: E501

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from twinmoe.backends import reference
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.backends.registry import Backend
from twinmoe.moe_core.combinations import ConfigError
from twinmoe.moe_core.compose import load_config
from twinmoe.testing.conftest import BACKENDS, load_or_skip
from twinmoe.testing.contract.adapters import adapter_of
from twinmoe.testing.field_cases.scenarios import FOUR, TWO, run_all
from twinmoe.testing.moe_core.routing.support import loss_gradients
from twinmoe.testing.moe_core.routing.support import settings as router_settings
from twinmoe.testing.processes import run_processes

HOST = [name for name in BACKENDS if name != "cuda"]  # one device holds one rank


@pytest.fixture(params=("reference", *BACKENDS), scope="session")
def home(request: pytest.FixtureRequest) -> Backend:
    return load_or_skip(request.param)


@lru_cache
def outcome(name: str, size: int) -> dict[str, str]:
    """What went wrong in a world of `size` ranks, by scenario."""
    if name == "reference":
        return run_ranks(size, lambda comm: run_all(reference, comm), 120)[0]
    return run_processes(size, "twinmoe.testing.field_cases.scenarios:process", {}, name, 120)


@pytest.mark.processes
@pytest.mark.parametrize("scenario", list(TWO))
@pytest.mark.parametrize("name", ["reference", *HOST])
def test_on_two_ranks(name: str, scenario: str) -> None:
    load_or_skip(name)
    assert outcome(name, 2)[scenario] == ""


@pytest.mark.processes
@pytest.mark.parametrize("scenario", list(FOUR))
@pytest.mark.parametrize("name", ["reference", *HOST])
def test_on_four_ranks(name: str, scenario: str) -> None:
    load_or_skip(name)
    assert outcome(name, 4)[scenario] == ""


# --- D8 ------------------------------------------------------------------------------------------
def test_fewer_experts_in_reach_than_chosen_is_refused_when_the_config_is_read() -> None:
    words = ["moe.num_experts=6", "moe.num_groups=3", "moe.group_top_k=1", "moe.top_k=3"]
    with pytest.raises(ConfigError, match="hold fewer experts than it chooses"):
        load_config("quickstart", words)


def test_the_balancing_bias_is_no_parameter(home: Backend) -> None:
    """(d) It gets no gradient: it is state, outside the parameters."""
    moe = router_settings(num_experts=6, top_k=2, bias_update_rate=0.001, aux_loss_coeff=1.0, aux_loss_scope="global")
    _, grads = loss_gradients(home, moe, "load_balance", np.eye(6)[:4], np.eye(6))
    assert len(grads) == 2


# --- D11 -----------------------------------------------------------------------------------------
SIZES = [0, 3, 0, 2]
X = np.array([[1.0, 2], [0, 1], [-1, 1], [2, 0], [1, 1]])
DY = np.array([[1.0, 0], [0, 1], [1, 1], [2, 0], [0, -1]])
W = np.array([[[9.0, 9], [9, 9]], [[1, 0], [2, 1]], [[7, 7], [7, 7]], [[0, 1], [1, -1]]])


@pytest.mark.parametrize("padding", [0, 3, 11])
def test_grouped_matmul_of_empty_groups(home: Backend, padding: int) -> None:
    """Rows past the last group hold NaN and touch nothing; empty groups get exact zeros, not old memory."""
    filler = np.full((padding, 2), np.nan)

    def fn(ops: Any, x: Any, w: Any) -> Any:
        return ops.grouped_matmul(x, w, ops.asarray(np.array(SIZES)))

    found = adapter_of(home.name).evaluate(
        home.ops, fn, [np.concatenate([X, filler]), W], lambda i, value: np.concatenate([DY, filler])
    )
    y, (dx, dw) = found.values[0], found.grads
    assert y[:5].tolist() == [[5, 2], [2, 1], [1, 1], [0, 2], [1, 0]]
    assert dx[:5].tolist() == [[1, 2], [0, 1], [1, 3], [0, 2], [-1, 1]]
    assert dw.tolist() == [[[0, 0], [0, 0]], [[0, -1], [3, 2]], [[0, 0], [0, 0]], [[4, -1], [0, -1]]]
