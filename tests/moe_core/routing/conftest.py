"""The `home` fixture: the reference and every backend that loads here."""

from __future__ import annotations

import pytest
from twinmoe.backends.registry import Backend
from twinmoe.testing.conftest import BACKENDS, load_or_skip


@pytest.fixture(params=("reference", *BACKENDS), scope="session")
def home(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn, the NumPy reference first."""
    return load_or_skip(request.param)
