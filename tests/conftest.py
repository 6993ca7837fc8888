"""The `backend` fixture: every backend that loads here."""

from __future__ import annotations

import pytest
from twinmoe.backends import registry

BACKENDS = ("cpu", "mindspore-cpu", "cuda")


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> registry.Backend:
    """Each backend in turn; skipped, with its own reason, where it does not work."""
    return load_or_skip(request.param)


def load_or_skip(name: str) -> registry.Backend:
    found = registry.probe(name)
    if not found.available:
        pytest.skip(f"{name}: {found.reason}")
    return registry.load(name, decided_by="test")
