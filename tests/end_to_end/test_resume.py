"""A run that goes on from a checkpoint is the unbroken run: bit for bit on the same layout, within rounding on any.

Runs differ by scheme, number of ranks and backend. The reference's runs cover the product here; processes a part of
it, and the whole under the marker `slow`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twinmoe.testing.conftest import load_or_skip
from twinmoe.testing.end_to_end.resume_runs import SAVED, STEPS, job, layouts, order, whole_tensors, write_text

TOLERANCE = 1e-9
PROCESSES = ("cpu", "mindspore-cpu")
Place = tuple[str, int, str]
"""Backend, ranks, layout."""


class Saved:
    """Unbroken runs by place, each with a checkpoint on the way; made when first asked for, one job per world."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.text = folder, write_text(folder / "text.txt")
        self._summaries: dict[Place, dict[str, Any]] = {}

    def make(self, backend: str, ranks: int, names: list[str]) -> None:
        missing = [name for name in names if (backend, ranks, name) not in self._summaries]
        if missing:
            orders = [order(name, self.text, self.run_dir((backend, ranks, name))) for name in missing]
            for name, summary in zip(missing, job(backend, ranks, orders), strict=True):
                self._summaries[backend, ranks, name] = summary

    def run_dir(self, place: Place) -> Path:
        return self.folder / "-".join(map(str, place))

    def losses(self, place: Place) -> list[float]:
        return self._summaries[place]["losses"]

    def checkpoint(self, place: Place, step: int = SAVED) -> Path:
        return self.run_dir(place) / "checkpoints" / f"step_{step:08d}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


def resume_all(saved: Saved, backend: str, ranks: int, pairs: list[tuple[Place, str]]) -> None:
    """Resume each checkpoint under its new layout in one job; losses are those of the unbroken run that saved it."""
    folders = [saved.folder / f"{backend}-{ranks}-{name}-from-{'-'.join(map(str, place))}" for place, name in pairs]
    orders = [order(name, saved.text, folder, saved.checkpoint(place)) for (place, name), folder in zip(pairs, folders)]
    for (place, name), folder, summary in zip(pairs, folders, job(backend, ranks, orders), strict=True):
        told = f"saved by {place}, resumed on {(backend, ranks, name)}"
        assert len(summary["losses"]) == STEPS
        assert summary["resumed"]["step"] == SAVED
        assert summary["losses"][:SAVED] == saved.losses(place)[:SAVED], told
        np.testing.assert_allclose(summary["losses"], saved.losses(place), rtol=TOLERANCE, err_msg=told)
        same = place == (backend, ranks, name)
        assert summary["resumed"]["bitwise"] == same, told
        if same:
            assert_bitwise(saved, place, folder, summary)


def assert_bitwise(saved: Saved, place: Place, folder: Path, summary: Mapping[str, Any]) -> None:
    """Losses, parameters and optimizer state."""
    assert summary["losses"] == saved.losses(place)
    unbroken = whole_tensors(saved.checkpoint(place, STEPS), place[2], saved.text)
    resumed = whole_tensors(folder / "checkpoints" / f"step_{STEPS:08d}", place[2], saved.text)
    assert unbroken.keys() == resumed.keys()
    assert {kind for _, kind in unbroken} == {"parameter", "exp_avg", "exp_avg_sq"}
    for key, value in unbroken.items():
        np.testing.assert_array_equal(resumed[key], value, err_msg=str(key))


def virtual_places(saved: Saved) -> list[Place]:
    """Runs on 1, 2 and 4 virtual ranks, by each scheme."""
    places: list[Place] = []
    for world in (1, 2, 4):
        saved.make("reference", world, layouts(world, "reference"))
        places += [("reference", world, name) for name in layouts(world, "reference")]
    return places


def one_to_one(places: list[Place], names: list[str]) -> list[tuple[Place, str]]:
    """Each place resumed under one layout, each layout taken about equally often."""
    return [(place, names[(i * 3 + i // len(names)) % len(names)]) for i, place in enumerate(places)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_virtual_ranks_go_on_as_they_were_and_under_other_schemes(saved: Saved, ranks: int) -> None:
    """The same layout, and every scheme and number of ranks to some other."""
    places = virtual_places(saved)
    same = [(place, place[2]) for place in places if place[1] == ranks]
    resume_all(saved, "reference", ranks, list(dict.fromkeys(same + one_to_one(places, layouts(ranks, "reference")))))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_scheme_goes_on_under_every_scheme_and_number_of_ranks(saved: Saved, ranks: int) -> None:
    """The whole product on virtual ranks."""
    resume_all(saved, "reference", ranks, list(itertools.product(virtual_places(saved), layouts(ranks, "reference"))))


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_processes_go_on_on_the_same_layout_bitwise_and_on_others_within_rounding(saved: Saved) -> None:
    """Four ranks of torch and two of MindSpore save and go on, also each with what the other saved; so does one."""
    for name in PROCESSES:
        load_or_skip(name)
    on_four, on_two = ["replicas", "laer", "fsdp_ep", "hiermoe", "groupwise"], ["ep", "laer", "fsdp_ep", "groupwise"]
    saved.make("cpu", 4, on_four)
    saved.make("mindspore-cpu", 2, on_two)
    four: list[Place] = [("cpu", 4, name) for name in on_four]
    two: list[Place] = [("mindspore-cpu", 2, name) for name in on_two]
    resume_all(saved, "cpu", 4, [(place, place[2]) for place in four] + one_to_one(two, layouts(4)))
    resume_all(saved, "mindspore-cpu", 2, [(place, place[2]) for place in two] + one_to_one(four, layouts(2)))
    resume_all(saved, "cpu", 1, one_to_one([*two, *four], layouts(1)))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("backend", PROCESSES)
def test_the_whole_matrix(saved: Saved, backend: str, ranks: int) -> None:
    """Every scheme, number of ranks and backend to every other."""
    places: list[Place] = []
    for name, world in itertools.product(PROCESSES, (1, 2, 4)):
        load_or_skip(name)
        saved.make(name, world, layouts(world))
        places += [(name, world, layout) for layout in layouts(world)]
    resume_all(saved, backend, ranks, list(itertools.product(places, layouts(ranks))))
