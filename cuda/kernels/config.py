"""Tile sizes and schedules of the expert kernels: one small table, filled by tests/bench/tune_cuda_kernels.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One kernel's schedule. `per_sm`: programs resident on a multiprocessor; `pieces`: parts of the epilogue."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 8
    per_sm: int = 1
    pieces: int = 1
    flatten: bool = True


@dataclass(frozen=True)
class Ring:
    """One warp-specialised kernel's schedule: depth of its rings of loads, of stores and (act) of h."""

    stages: int = 4
    outs: int = 2
    group: int = 8
    slots: int = 2


@dataclass(frozen=True)
class Rings:
    """The warp-specialised kernels in use, tiles of 128 x 256 x 64; None: the kernel of the `Schedule`'s tile."""

    up: Ring | None = None
    down: Ring | None = None
    act: Ring | None = None
    dx: Ring | None = None
    dw_up: Ring | None = None
    dw_down: Ring | None = None


@dataclass(frozen=True)
class Schedule:
    """The tiles of all expert kernels on one kind of card. Row tiles (up, down, act, dx) share `bm`."""

    up: Tile
    down: Tile
    act: Tile
    dx: Tile
    dw_up: Tile
    dw_down: Tile
    rings: Rings = Rings()

    @property
    def block_m(self) -> int:
        return self.up.bm


HOPPER = Schedule(
    up=Tile(128, 128, 64, 8, 3, flatten=False),
    down=Tile(128, 256, 64, 8, 3, pieces=2),
    act=Tile(128, 256, 64, 8, 3, group=4, pieces=8),
    dx=Tile(128, 256, 64, 8, 3, pieces=4),
    dw_up=Tile(128, 256, 64, 8, 5, flatten=False),
    dw_down=Tile(256, 128, 64, 8, 5, flatten=False),
    rings=Rings(
        up=Ring(3, 3),
        down=Ring(3, 4),
        act=Ring(3, 2),
        dx=Ring(),
        dw_up=Ring(3, 4),
        dw_down=Ring(3, 4),
    ),
)
AMPERE = Schedule(
    up=Tile(64, 64, 32, 8, 3, flatten=False),
    down=Tile(64, 128, 32, 8, 3, flatten=False),
    act=Tile(64, 64, 32, 8, 3, pieces=2, flatten=False),
    dx=Tile(64, 128, 32, 8, 3, flatten=False),
    dw_up=Tile(128, 128, 32, 8, 3, flatten=False),
    dw_down=Tile(128, 128, 32, 8, 3, flatten=False),
)
SMALL = Schedule(
    up=Tile(16, 32, 32, 4, 2, group=2),
    down=Tile(16, 32, 32, 4, 2, group=2),
    act=Tile(16, 32, 32, 4, 2, group=2, pieces=2),
    dx=Tile(16, 32, 32, 4, 2, group=2),
    dw_up=Tile(32, 32, 32, 4, 2, group=2),
    dw_down=Tile(32, 32, 32, 4, 2, group=2),
)
"""Small tiles: for the interpreter, where every program costs milliseconds."""


def schedule_for(capability: int) -> Schedule:
    """The schedule of a compute capability (90 = Hopper)."""
    return HOPPER if capability >= 90 else AMPERE
