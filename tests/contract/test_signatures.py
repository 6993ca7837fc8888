"""Every backend offers exactly the contract's functions: same names, parameters, order and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twinmoe.backends import protocol, registry
from twinmoe.testing.conftest import BACKENDS, load_or_skip

PARTS = {"ops": protocol.Ops, "comm": protocol.Comm, "trainer": protocol.Trainer}


@pytest.fixture(params=("reference", *BACKENDS), scope="module")
def home(request: pytest.FixtureRequest) -> registry.Backend:
    return load_or_skip(request.param)


def declared(contract: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions of a Protocol."""
    for name, function in inspect.getmembers(contract, inspect.isfunction):
        if not name.startswith("_"):
            yield name, function


def parameters(function: Callable[..., Any], skip_self: bool) -> list[tuple[str, Any, Any]]:
    """(name, kind, default) of each parameter."""
    found = list(inspect.signature(function).parameters.values())[1 if skip_self else 0 :]
    return [(p.name, p.kind, p.default) for p in found]


def differences(contract: type, offered: Any) -> list[str]:
    """What `offered` (a module or an object) lacks or declares otherwise."""
    wrong = []
    for name, function in declared(contract):
        own = getattr(offered, name, None)
        if own is None:
            wrong.append(f"{name} is missing")
        elif parameters(own, False) != parameters(function, True):
            wrong.append(f"{name}{inspect.signature(own)} should be {name}{inspect.signature(function)}")
    return wrong


@pytest.mark.parametrize("part", list(PARTS))
def test_module_has_the_contract_s_signatures(home: registry.Backend, part: str) -> None:
    assert differences(PARTS[part], getattr(home, part)) == []


def test_communicator_has_the_contract_s_signatures(home: registry.Backend) -> None:
    comm = home.comm.connect(protocol.Launch())
    assert differences(protocol.Communicator, comm) == []
    assert (comm.rank, comm.size) == (0, 1)


@pytest.mark.parametrize(
    "broken",
    [
        lambda x_ND, w_GDF: None,
        lambda x_ND, w_GDF, counts: None,
        lambda w_GDF, x_ND, counts_G: None,
        lambda x_ND, w_GDF, counts_G=None: None,
    ],
)
def test_a_changed_signature_is_seen(broken: Callable[..., Any]) -> None:
    class Changed:
        grouped_matmul = staticmethod(broken)

    assert any(d.startswith("grouped_matmul(") for d in differences(protocol.Ops, Changed()))
    assert "topk is missing" in differences(protocol.Ops, Changed())
