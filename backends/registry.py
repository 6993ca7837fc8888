"""Which backend runs: names, homes, the environment flag and who decides. The only file that reads the environment.

The flag `TWINMOE_BACKEND` and the launchers' variables are read here and nowhere else; the rest of the
package receives a `Backend` and a `Launch`.
"""

from __future__ import annotations

import glob
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

from . import launchers
from .launchers import LauncherName, LaunchError
from .protocol import Comm, Launch, Ops, Trainer

FLAG = "TWINMOE_BACKEND"
AUTO = "auto"
Launcher = Literal["torchrun", "msrun"]


class BackendError(Exception):
    """No such backend, or not on this machine: one sentence with what is missing and what would work."""


@dataclass(frozen=True)
class Home:
    """Where a backend lives. extra: what to install. device_files: patterns, one of which must exist."""

    module: str
    extra: str | None = None
    launcher: Launcher = "torchrun"
    device: str | None = None
    device_files: tuple[str, ...] = ()
    internal: bool = False
    torch: bool = False

    @property
    def remedy(self) -> str:
        """What to do where it does not work."""
        package = f"twinmoe[{self.extra}]" if self.extra else "torch"
        return f"install {package}" + (f" on a machine with {self.device}" if self.device else "")

    def has_device(self) -> bool:
        """Whether a device is there, by a look at the file system that costs nothing."""
        return not self.device_files or any(glob.glob(pattern) for pattern in self.device_files)


Settings = Mapping[str, Any]
"""The section `communication` of a config, by field."""


class HomeModule(Protocol):
    """What a home module offers.

    It may also have device_count() -> int (without it ranks share the host), worker_environment(settings) ->
    variables (settings: what `communication` says; missing ones have the home's defaults),
    communicator_bytes(groups, environment) -> int, and explained(message) -> str | None.
    """

    ops: Ops
    comm: Comm
    trainer: Trainer

    def probe(self) -> tuple[bool, str, Mapping[str, str]]:
        """(works here, why or why not in one sentence, versions of what it stands on)."""
        ...


_NPU = ("/dev/davinci[0-9]*",)
_GPU = ("/dev/nvidia[0-9]*", "/dev/dxg")

HOMES: Mapping[str, Home] = {
    "cpu": Home(".torch_shared.cpu", torch=True),
    "cuda": Home("..cuda.backend", "cuda", device="an NVIDIA GPU", device_files=_GPU, torch=True),
    "ascend": Home("..ascend.mindspore.npu", "ascend", "msrun", "an Ascend NPU and CANN", _NPU),
    "ascend-torch": Home(
        "..ascend.torch_npu.backend", "ascend-torch", device="an Ascend NPU and CANN", device_files=_NPU, torch=True
    ),
    "mindspore-cpu": Home("..ascend.mindspore.cpu", "ascend"),
    "reference": Home(".reference", internal=True),
}
NAMES = (AUTO, *(name for name, home in HOMES.items() if not home.internal))
AUTO_ORDER = ("ascend", "ascend-torch", "cuda", "cpu")


@dataclass(frozen=True)
class Probe:
    """What a home says of itself on this machine. devices: how many, or None where ranks share the host."""

    available: bool
    reason: str
    versions: Mapping[str, str] = field(default_factory=dict)
    devices: int | None = None


@dataclass(frozen=True)
class Backend:
    """The chosen backend: three modules and why they were chosen."""

    name: str
    ops: Ops
    comm: Comm
    trainer: Trainer
    launcher: Launcher
    decided_by: str
    reason: str
    versions: Mapping[str, str]
    devices: int | None = None


@dataclass(frozen=True)
class Choice:
    """A backend's name, who asked for it, and why."""

    name: str
    decided_by: str
    reason: str


def requested(command_line: str | None = None, file: str | None = None) -> tuple[str, str]:
    """(name, who decides): the command line, else the environment flag, else the file, else auto."""
    flag = os.environ.get(FLAG) or None
    for name, source in ((command_line, "command line"), (flag, f"environment ({FLAG})"), (file, "file")):
        if name is not None:
            return name, source
    return AUTO, "default"


def choose(command_line: str | None = None, file: str | None = None) -> Choice:
    """The backend that will run and why. BackendError if the named one is unknown or does not work here."""
    name, decided_by = requested(command_line, file)
    if name not in HOMES and name != AUTO:
        raise BackendError(f"unknown backend {name!r} (from the {decided_by}); choose one of {', '.join(NAMES)}")
    if name == AUTO:
        return _automatic(decided_by)
    found = probe(name)
    if not found.available:
        raise BackendError(
            f"backend {name!r} (from the {decided_by}) does not work here: {found.reason}; "
            f"{HOMES[name].remedy}, or choose {_working(name)}"
        )
    return Choice(name, decided_by, found.reason)


def load(name: str | None = None, decided_by: str | None = None, file: str | None = None) -> Backend:
    """The backend of that name, or by precedence command line (`name`) > environment > `file` > auto.

    decided_by: who chose `name`, when the choice was made before (a worker repeats its parent's).
    Raises BackendError with one sentence.
    """
    choice = choose(name, file)
    home = _import(HOMES[choice.name])
    found = probe(choice.name)
    return Backend(
        name=choice.name,
        ops=home.ops,
        comm=home.comm,
        trainer=home.trainer,
        launcher=HOMES[choice.name].launcher,
        decided_by=decided_by or choice.decided_by,
        reason=choice.reason,
        versions=found.versions,
        devices=found.devices,
    )


def probe(name: str) -> Probe:
    """Ask one home whether it works here; a home that can't be imported says why."""
    try:
        home = _import(HOMES[name])
        available, reason, versions = home.probe()
    except Exception as error:  # whatever a broken installation raises is this home's reason, not our failure
        return Probe(False, f"{type(error).__name__}: {_first_line(error)}")
    count = getattr(home, "device_count", None)
    devices = count() if available and count else None
    return Probe(available, reason, dict(versions), devices)


def probe_all() -> dict[str, Probe]:
    """Every backend that a user may name, for `doctor`."""
    return {name: probe(name) for name, home in HOMES.items() if not home.internal}


def fitting_extra() -> str | None:
    """The extra that this machine's devices ask for, whether it is installed or not."""
    return next(
        (HOMES[name].extra for name in AUTO_ORDER if HOMES[name].device_files and HOMES[name].has_device()), None
    )


def launcher_name(backend: str) -> Launcher:
    """Which launcher starts the workers of a backend."""
    return HOMES[backend].launcher


def read_launch() -> Launch:
    """Who this process is, as its launcher said; alone where there is none. LaunchError in one sentence."""
    return launchers.resolve(os.environ)


def surrounding_launcher() -> LauncherName | None:
    """The launcher that started this process, or None."""
    return launchers.launcher_of(os.environ)


def told_variables(prefix: str) -> dict[str, str]:
    """Variables that begin so: what a device's library was told, for code that must agree with it."""
    return {name: value for name, value in os.environ.items() if name.startswith(prefix)}


def is_scheduler() -> bool:
    """Whether this process is msrun's scheduler, which joins the job and computes nothing."""
    return launchers.is_scheduler(os.environ)


def worker_environment(
    python_folder: str, backend: str | None = None, settings: Settings | None = None
) -> dict[str, str]:
    """Environment for local workers: one compute thread each and what the backend asks for; the user's values win.

    python_folder goes first on the path because msrun starts whatever `python` it finds there.
    """
    path = os.pathsep.join(p for p in (python_folder, os.environ.get("PATH", "")) if p)
    asked = home_environment(backend, settings) if backend else {}
    return {"OMP_NUM_THREADS": "1", **asked, **os.environ, "PATH": path}


def home_environment(backend: str, settings: Settings | None = None) -> dict[str, str]:
    """Variables that a backend wants set before its framework starts in a worker; most want none."""
    make = getattr(_import(HOMES[backend]), "worker_environment", None)
    return dict(make(settings or {})) if make else {}


def communicator_bytes(backend: str, groups: Sequence[tuple[int, ...]], settings: Settings | None = None) -> int:
    """Device memory that a backend's transport takes for groups of these ranks; 0 where it takes none of note."""
    count = getattr(_import(HOMES[backend]), "communicator_bytes", None)
    return int(count(groups, {**home_environment(backend, settings), **os.environ})) if count else 0


def explained(backend: str, message: str) -> str | None:
    """What a device's error code in a message means and what to do, where the backend knows it."""
    try:
        explain = getattr(_import(HOMES[backend]), "explained", None)
    except Exception:  # a home that can't be imported is told of elsewhere, and must not hide that message
        return None
    return explain(message) if explain else None


def model_blocks(backend: str) -> Any:
    """The module that swaps blocks inside torch models. BackendError where the backend's framework is another."""
    if not HOMES[backend].torch:
        names = ", ".join(name for name, home in HOMES.items() if home.torch)
        raise BackendError(f"models of transformers are torch's, backend {backend!r} is not; choose one of {names}")
    return importlib.import_module(".torch_shared.blocks", __package__)


def _automatic(decided_by: str) -> Choice:
    why_not = []
    for name in AUTO_ORDER:
        home = HOMES[name]
        if not home.has_device():
            why_not.append(f"{name}: no device")
            continue
        found = probe(name)
        if found.available:
            return Choice(name, decided_by, "; ".join([found.reason, *why_not]))
        why_not.append(f"{name}: {found.reason}")
    raise BackendError(f"no backend works here ({'; '.join(why_not)}); {HOMES['cpu'].remedy}")


def _working(but: str) -> str:
    works = [name for name in HOMES if not HOMES[name].internal and name != but and probe(name).available]
    return " or ".join([*works, AUTO])


def _import(home: Home) -> HomeModule:
    return cast(HomeModule, importlib.import_module(home.module, package=__package__))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or "no message"


__all__ = [
    "AUTO",
    "FLAG",
    "HOMES",
    "NAMES",
    "Backend",
    "BackendError",
    "Choice",
    "Home",
    "LaunchError",
    "Probe",
    "choose",
    "communicator_bytes",
    "explained",
    "fitting_extra",
    "home_environment",
    "is_scheduler",
    "launcher_name",
    "load",
    "model_blocks",
    "probe",
    "probe_all",
    "read_launch",
    "requested",
    "surrounding_launcher",
    "told_variables",
    "worker_environment",
]
