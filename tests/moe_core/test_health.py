"""Figures that tell early that a run goes wrong, and the rules that say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from twinmoe.backends.protocol import Launch
from twinmoe.backends.reference.comm import run_ranks
from twinmoe.backends.registry import load
from twinmoe.moe_core.config import Config
from twinmoe.moe_core.health import DEAD_AFTER, PARTS, REPEAT, RULES, Health, load_figures, part_of
from twinmoe.moe_core.mesh import Mesh
from twinmoe.moe_core.metrics import read_metrics
from twinmoe.moe_core.shapes import declared
from twinmoe.testing.end_to_end.resume_runs import carry_out, layouts, order, virtual, write_text

QUIET: dict[str, Any] = {"step": 7}
EVEN = np.full((2, 4), 5.0)


def test_every_part_of_a_model_is_in_one_group() -> None:
    found = {part_of(p.name, p) for p in declared(Config(), Mesh())}
    assert found == set(PARTS)
    heads = Config.model_validate({"moe": {"num_heads": 2, "head_dim": 8, "norm_topk_prob": True}})
    routers = [p.name for p in declared(heads, Mesh()) if part_of(p.name, p) == "router"]
    assert len(routers) == heads.model.num_layers


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_squares_of_the_parts_add_up_to_the_clipping_norm(tmp_path: Any, ranks: int) -> None:
    """On every layout: each element once, whoever holds it."""
    text = write_text(tmp_path / "text.txt")
    norms = []
    for name in layouts(ranks, "reference"):
        virtual(ranks, order(name, text, tmp_path / name, health_every=1, steps=2))
        records = read_metrics(tmp_path / name)
        for record in records:
            squares = sum(v**2 for v in record["grad_norms"].values())
            assert squares**0.5 == pytest.approx(record["grad_norm"], rel=1e-12), name
        norms.append([record["grad_norms"][part] for record in records for part in PARTS])
    np.testing.assert_allclose(norms, norms[:1] * len(norms), rtol=1e-8)


def test_processes_of_torch_count_every_element_once_too(tmp_path: Any) -> None:
    text = write_text(tmp_path / "text.txt")
    carry_out(load("cpu"), Launch(), [order("ep", text, tmp_path / "run", health_every=1, steps=1)])
    record = read_metrics(tmp_path / "run")[0]
    assert sum(v**2 for v in record["grad_norms"].values()) ** 0.5 == pytest.approx(record["grad_norm"], rel=1e-12)


def test_load_figures_of_known_loads() -> None:
    found = load_figures(np.array([[4.0, 4, 4, 4], [16, 0, 0, 0]]))
    assert found["load_percentiles"]["p50"] == pytest.approx((1 + 0) / 2)
    assert found["router_entropy"] == {"mean": 0.5, "min": 0.0}
    assert load_figures(np.zeros((0, 4))) == {}
    assert load_figures(np.zeros((1, 4))) == {}, "a step of padding only has no shares"


def test_an_expert_without_tokens_is_named_once_and_again_much_later() -> None:
    health, load_LE = Health((0, 3), 0), EVEN.copy()
    load_LE[1, 2] = 0
    told = [health.warnings(QUIET, load_LE) for _ in range(DEAD_AFTER + REPEAT)]
    assert [n for n, sentences in enumerate(told) if sentences] == [DEAD_AFTER - 1, DEAD_AFTER + REPEAT - 1]
    assert told[DEAD_AFTER - 1] == ["step 7: layer 3: no token chose expert 2 for 50 steps or more"]
    assert health.warnings(QUIET, EVEN) == []
    assert health.warnings(QUIET, load_LE) == [], "counting starts anew"


BAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "load": ({"load_percentiles": {"p95": 4.1}}, {"load_percentiles": {"p95": 3.9}}),
    "drops": ({"drop_rate": 0.2}, {"drop_rate": 0.05}),
    "entropy": ({"router_entropy": {"min": 0.4}}, {"router_entropy": {"min": 0.6}}),
    "ranks": ({"rank_imbalance": 3.5}, {"rank_imbalance": 2.0}),
    "router_gradient": ({"grad_norms": {"router": 0.0, "experts": 1.0}}, {"grad_norms": {"router": 1.0, "experts": 1}}),
}


@pytest.mark.parametrize("name", list(RULES))
def test_a_rule_speaks_after_its_steps_in_a_row_and_not_before(name: str) -> None:
    bad, good = ({**QUIET, **record} for record in BAD[name])
    steps, health = RULES[name].steps, Health((0, 1), 0)
    for _ in range(steps - 1):
        assert health.warnings(bad, EVEN) == []
    health.warnings(good, EVEN)
    told = [health.warnings(bad, EVEN) for _ in range(steps)]
    assert [bool(sentences) for sentences in told] == [False] * (steps - 1) + [True]
    assert told[-1][0].startswith("step 7: ")


def test_no_router_gradient_where_there_is_no_gradient_at_all_is_no_news() -> None:
    health = Health((0,), 0)
    assert health.warnings({**QUIET, "grad_norms": {"router": 0.0, "experts": 0.0}}, EVEN[:1]) == []


def test_a_norm_ten_times_its_median_is_told() -> None:
    health = Health((0, 1), 1)
    for _ in range(6):
        assert health.warnings({**QUIET, "grad_norms": {"attention": 1.0}}, EVEN) == []
    assert (
        "the gradient norm of attention is 11" in health.warnings({**QUIET, "grad_norms": {"attention": 11.0}}, EVEN)[0]
    )


def test_a_healthy_run_warns_of_nothing(tmp_path: Any) -> None:
    text = write_text(tmp_path / "text.txt")
    found = run_ranks(
        2, lambda c: carry_out(load("reference"), Launch(c.rank, 2), [order("ep", text, tmp_path / "r", steps=30)])
    )
    assert found[0]["summaries"][0]["warnings"] == []
