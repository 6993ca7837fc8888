"""Names, and a router from outside the package: the example of docs/routers.md, run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from twinmoe.backends.registry import Backend
from twinmoe.moe_core import routing
from twinmoe.moe_core.compose import load_config
from twinmoe.testing.moe_core.routing.support import route, settings

DOCS = Path(__file__).parents[3] / "docs" / "routers.md"
X = np.random.default_rng(0).standard_normal((6, 8))


@pytest.fixture(scope="module")
def example() -> str:
    """Source of the docs' own-router example; running it registers `nearest`."""
    found = re.search(r"```python\n(.*?register_router.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    if "nearest" not in routing.router_names():
        exec(compile(found[1], str(DOCS), "exec"), {})
    return found[1]


def test_every_name_of_the_field_is_known() -> None:
    assert set(routing.router_names()) >= {
        "topk", "switch", "grap", "hash", "hierarchical", "expert_token_resonance", "expert_choice", "domain",
        "random_routed",
    }  # fmt: skip


def test_the_example_fits_in_twenty_lines(example: str) -> None:
    assert len([line for line in example.splitlines() if line.strip()]) <= 20


def test_a_router_from_outside_has_capacity_losses_and_padding(example: str, home: Backend) -> None:
    moe = settings(router="nearest", num_experts=4, top_k=1, aux_loss_coeff=1.0, capacity_factor=1.0)
    w = np.random.default_rng(1).standard_normal((8, 4))
    routed = route(home, moe, X, w, real_T=[True] * 5 + [False], total=5.0)
    nearest = ((X[:, :, None] - w) ** 2).sum(1).argmin(1)
    np.testing.assert_array_equal(routed.chosen[:5, 0], nearest[:5])
    assert routed.chosen[5].tolist() == [-1]
    assert np.bincount(routed.ids[routed.ids >= 0], minlength=4).max() <= 2
    assert np.isfinite(routed.losses["load_balance"])


def test_names_are_taken_once_and_unknown_ones_are_refused(example: str, home: Backend) -> None:
    with pytest.raises(ValueError, match="'nearest' exists already"):
        routing.register_router("nearest", lambda context: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"is unknown; choose one of (\w+, )*domain, expert_choice"):
        route(home, settings(router="nearset"), X)


def test_an_installed_package_offers_a_router(tmp_path: Path, home: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is known to config files, so that workers of a job have it too."""
    about = tmp_path / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[twinmoe.routers]\noffered = mine_router:Offered\n")
    (tmp_path / "mine_router.py").write_text("from twinmoe.moe_core.routing.hashed import HashRouter as Offered\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert load_config({}, ["moe.router=offered"]).moe.router == "offered"
        moe = settings(router="offered", num_experts=4, top_k=2)
        ids = np.arange(6)
        np.testing.assert_array_equal(
            route(home, moe, X, token_ids_T=ids, vocab_size=8).chosen,
            route(home, settings(router="hash", num_experts=4, top_k=2), X, token_ids_T=ids, vocab_size=8).chosen,
        )
    assert "offered" not in routing._offered(tuple(sys.path))
