"""What a run is besides its tensors, for the manifest of a checkpoint; and taking it up again, on any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.protocol import Communicator, Group
from .checkpoint import Checkpoint, CheckpointError, logical_shapes, understood
from .mesh import AXES, Mesh
from .placement import restore_placements
from .planning import Planner
from .run_folder import library_versions, model_hash
from .shapes import declared

if TYPE_CHECKING:
    from .train import Session

LOSSES = "losses"
_LONGEST = 1000
"""Bytes of a sentence that ranks tell one another."""


@dataclass(frozen=True)
class Resumed:
    """Where a run went on. bitwise: the layout is that of the save, so the run is the unbroken one bit for bit."""

    folder: Path
    step: int
    bitwise: bool
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "step": self.step, "bitwise": self.bitwise, "notes": list(self.notes)}


def manifest_of(session: Session) -> dict[str, Any]:
    """Everything of a run that is no array."""
    config, mesh = session.config, session.runtime.mesh
    return {
        "step": session.step,
        "updates": session.updates,
        "config": config.model_dump(mode="json"),
        "data": data_position(session),
        "model_hash": model_hash(config),
        "backend": session.backend.name,
        "world_size": session.comm.size,
        "mesh": {axis: getattr(mesh, axis) for axis in AXES},
        "versions": library_versions(),
        "random": "keyed by seed, step, layer and token: there are no generators whose state could be lost",
        "router_states": session.router_states.as_json(),
        "arrangement": session.arrangement.as_json(),
        "placements": [layer.planner.owned_RC.tolist() for layer in session.placed],
        "guard": session.guard.as_json(),
    }


def data_position(session: Session) -> dict[str, Any]:
    """What decides which tokens a step sees; the position itself is the step."""
    train = session.config.train
    return {
        "data_hash": session.data.hash,
        "train.seed": train.seed,
        "train.global_batch_size": train.global_batch_size,
        "train.sequence_length": train.sequence_length,
    }


def state_of(session: Session) -> dict[str, np.ndarray]:
    """Arrays of this rank that are no parameters: losses (rank 0), and what planners remember (one rank a group)."""
    arrays = {} if session.comm.rank else {LOSSES: np.array(session.losses, np.float64)}
    if leads(session.runtime.groups):
        for layer, planner in planners(session):
            for name, value in planner.state().items():
                arrays[planner_key(session.runtime.groups["expert"], layer, name)] = np.asarray(value)
    return arrays


def leads(groups: Mapping[str, Group]) -> bool:
    """Whether this rank speaks for its expert group: planners of a group remember alike."""
    return groups["expert"].index == 0 and groups["tensor"].index == 0


def planner_key(expert: Group, layer: int, name: str) -> str:
    """Expert groups differ in what they saw: each has its own memory, named by its first rank."""
    return f"planners.{expert.ranks[0]}.{layer}.{name}"


def planners(session: Session) -> list[tuple[int, Planner]]:
    """(layer, planner) of every MoE layer."""
    found = []
    for index, layer in sorted(session.model.layers.items()):
        planner = getattr(getattr(layer, "inner", layer), "planner", None)
        found += [] if planner is None else [(index, planner)]
    return found


def open_newest(folders: Sequence[Path], comm: Communicator, world: Group) -> tuple[Checkpoint, list[str]]:
    """The first of `folders` that is whole, and what was wrong with those before it. Ranks share the reading.

    CheckpointError on every rank where none is.
    """
    told: list[str] = []
    for folder in folders:
        found: Checkpoint | None = None
        problem = ""
        try:
            found = Checkpoint(folder, (world.index, world.size))
        except CheckpointError as error:
            problem = str(error)
        problem = _first_said(problem, comm, world)
        if not problem and found is not None:
            return found, [f"{sentence}: skipped" for sentence in told]
        told.append(problem)
    raise CheckpointError("; ".join(told))


def _first_said(sentence: str, comm: Communicator, world: Group) -> str:
    """What the first rank that has something to say says, the same on every rank; '' if none does."""
    mine = np.frombuffer(sentence.encode("utf-8")[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    rows = comm.gather_to_host(mine, world).astype(np.uint8)
    said = (row.tobytes().rstrip(b"\0").decode("utf-8", "replace") for row in rows)
    return next(filter(None, said), "")


def restore(session: Session, folders: Sequence[Path]) -> Resumed | None:
    """Take up a checkpoint: parameters, optimizer, position in the data, what was learned without gradients.

    CheckpointError, before anything is changed, if it is damaged or not this model's or these data's. Collective.
    """
    if not folders:
        return None
    checkpoint, notes = open_newest(folders, session.comm, session.runtime.groups["world"])
    with understood(checkpoint.folder):
        bitwise, new = _restore_learned(session, checkpoint)
    session.backend.trainer.load_tensors(session.state, checkpoint.values(session.parameters), checkpoint.updates)
    session.step = checkpoint.step
    return Resumed(checkpoint.folder, checkpoint.step, bitwise, (*notes, *new, *_finished(session)))


def _finished(session: Session) -> list[str]:
    steps = session.config.train.steps
    if session.step < steps:
        return []
    return [
        f"the run was finished: it is at step {session.step} of train.steps={steps}; set train.steps to more to go on"
    ]


def _restore_learned(session: Session, checkpoint: Checkpoint) -> tuple[bool, list[str]]:
    """Everything but parameters and optimizer; whether the run will be the same bit for bit, and notes."""
    _check(session, checkpoint)
    manifest, state = checkpoint.manifest, checkpoint.state()
    same = _same_mesh(session, manifest)
    notes = _changes(session, manifest)
    session.router_states.restore(manifest["router_states"])
    session.arrangement.restore(manifest["arrangement"])
    restore_placements(session.placed, manifest["placements"])
    notes += _restore_planners(session, state, same)
    session.guard.restore(manifest["guard"])
    session.losses = state[LOSSES].tolist()
    if len(session.losses) != checkpoint.step:
        raise ValueError(f"{len(session.losses)} losses of {checkpoint.step} steps")
    return same and _same_numbers(session, manifest), notes


def _check(session: Session, checkpoint: Checkpoint) -> None:
    folder, manifest = checkpoint.folder, checkpoint.manifest
    mine = {**data_position(session), "model_hash": model_hash(session.config)}
    saved = {**manifest["data"], "model_hash": manifest["model_hash"]}
    for name, value in mine.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{folder} was saved with {name} {saved.get(name)}, this run has {value}; resume with the same "
                "data and model"
            )
    checkpoint.check_complete(logical_shapes(declared(session.config, Mesh())))


def _same_mesh(session: Session, manifest: Mapping[str, Any]) -> bool:
    """Whether ranks, and what runs on them, are those of the save."""
    mesh, ours, theirs = session.runtime.mesh, session.config.model_dump(mode="json"), manifest["config"]
    unnamed = {"scheme": None, "expert_parallel_size": None}  # a name, and what the mesh says more exactly
    return (
        all(manifest["mesh"][axis] == getattr(mesh, axis) for axis in AXES)
        and {**ours["parallel"], **unnamed} == {**theirs["parallel"], **unnamed}
        and ours["cluster"] == theirs["cluster"]
    )


def _same_numbers(session: Session, manifest: Mapping[str, Any]) -> bool:
    """Whether every number is computed in the same way, too."""
    ours, theirs = session.config.model_dump(mode="json")["train"], manifest["config"]["train"]
    return manifest["backend"] == session.backend.name and all(
        ours[name] == theirs.get(name) for name in ("dtype", "micro_batch_size", "recompute")
    )


def _changes(session: Session, manifest: Mapping[str, Any]) -> list[str]:
    """What is different from the run that saved, in sentences."""
    config = session.config
    ours = {"backend": session.backend.name, "ranks": session.comm.size, "scheme": config.parallel.scheme}
    saved = {
        "backend": manifest["backend"],
        "ranks": manifest["world_size"],
        "scheme": manifest["config"]["parallel"]["scheme"],
    }
    ours["dtype"], saved["dtype"] = config.train.dtype, manifest["config"]["train"]["dtype"]
    changed = [f"{name} {saved[name]} became {ours[name]}" for name in ours if ours[name] != saved[name]]
    return [f"the layout of the run changed: {', '.join(changed)}"] if changed else []


def _restore_planners(session: Session, state: Mapping[str, np.ndarray], same: bool) -> list[str]:
    """Memories of planners belong to their ranks: on another layout they start afresh, which is said."""
    afresh = []
    for layer, planner in planners(session):
        names = planner.state()
        if not names:
            continue
        saved = {name: state.get(planner_key(session.runtime.groups["expert"], layer, name)) for name in names}
        if same and all(value is not None for value in saved.values()):
            planner.load({name: value for name, value in saved.items() if value is not None})
        else:
            afresh.append(str(layer))
    if not afresh:
        return []
    return [f"planners of layers {', '.join(afresh)} start afresh: what they remembered was of another layout"]
