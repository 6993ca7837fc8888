"""The `backend` fixture: every backend that loads here."""

from __future__ import annotations

import hypothesis
import pytest
from twinmoe.backends import registry

hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.register_profile("searching", deadline=None, print_blob=True)
if hypothesis.settings.get_current_profile_name() == "default":  # --hypothesis-profile=searching draws new examples
    hypothesis.settings.load_profile("steady")

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
