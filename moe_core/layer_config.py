"""The config of a layer in somebody else's model: composed and checked as an experiment's, less what a loop does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .combinations import RULES, ConfigError, check_combinations, mesh_of
from .compose import AUTO, compose
from .config import Config, MoeConfig, ParallelConfig
from .mesh import Mesh

RULES_OF_A_LAYER = tuple(
    rule for rule in RULES if {rule.first.split(".")[0], rule.second.split(".")[0]} <= {"moe", "parallel"}
)
_SIZES = {"expert_parallel_size": "expert", "head_parallel_size": "head", "tensor_parallel_size": "tensor"}

_LOOP: Mapping[str, tuple[Callable[[Config], bool], str]] = {
    "moe.router_jitter": (lambda c: c.moe.router_jitter > 0, "the step keys its noise; set it to 0"),
    "moe.bias_update_rate": (lambda c: c.moe.bias_update_rate > 0, "the loop updates the bias; set it to 0"),
    "moe.capacity_rule": (lambda c: c.moe.capacity_rule != "factor", "the loop learns the angle; set it to factor"),
    "moe.aux_loss_layers": (
        lambda c: c.moe.aux_loss_layers != "separate",
        "the model joins its layers; set it to separate",
    ),
    "parallel.scheme": (lambda c: c.parallel.scheme == AUTO, "the command looks for one; name one, such as llep"),
    "parallel.placement": (lambda c: c.parallel.placement != "fixed", "the loop swaps experts; set it to fixed"),
    "parallel.prefetch_layers": (
        lambda c: c.parallel.prefetch_layers > 0,
        "the model knows which layer comes next; set it to 0",
    ),
    "parallel.data_sharding": (
        lambda c: c.parallel.data_sharding != "none",
        "wrap your model in FSDP2 with ignored_params=expert_parameters(layer), and set it to none",
    ),
    "parallel.data_assignment": (
        lambda c: c.parallel.data_assignment != "round_robin",
        "the loop hands out sequences; set it to round_robin",
    ),
}
"""Option -> (whether a config asks for it, why only twinmoe's own training honours it and what to do)."""


def layer_config(
    moe: MoeConfig | Mapping[str, Any], parallel: ParallelConfig | Mapping[str, Any] | None, mesh: Mesh | None
) -> Config:
    """One checked Config; `parallel.scheme` brings its axes. mesh: its sizes stand where `parallel` names none.

    ConfigError in one sentence: an unknown key, a wrong type, a refused combination, an option of the loop's.
    """
    if isinstance(moe, Mapping) and moe.get("nan_policy") == "raise":
        raise ConfigError(
            _of_the_loop("moe.nan_policy=raise", "read out.stats.statistics['nan_tokens'], and leave it out")
        )
    ways = _written({} if parallel is None else parallel)
    if mesh is not None and isinstance(ways, Mapping):
        ways = {**{size: getattr(mesh, axis) for size, axis in _SIZES.items()}, **ways}
    config = compose({"moe": _written(moe), "parallel": ways})
    check_combinations(config, RULES_OF_A_LAYER)
    for option, (asked, why) in _LOOP.items():
        if asked(config):
            section, key = option.split(".")
            raise ConfigError(_of_the_loop(f"{option}={getattr(getattr(config, section), key)}", why))
    return config


def layer_mesh(config: Config, mesh: Mesh | None, ranks: int) -> Mesh:
    """The mesh that was given, or the one that `parallel` makes of the ranks. ConfigError where they disagree."""
    if mesh is None:
        return mesh_of(config, ranks)
    if mesh.size != ranks:
        raise ConfigError(f"the mesh has {mesh.size} ranks and the job {ranks}; use Mesh.over({ranks}, ...)")
    for size, axis in _SIZES.items():
        asked = getattr(config.parallel, size)
        if asked not in ("auto", getattr(mesh, axis)):
            raise ConfigError(
                f"parallel.{size}={asked}, but the mesh has {axis}={getattr(mesh, axis)}; leave one of them out"
            )
    return mesh


def check_width(hidden_size: object) -> None:
    """ConfigError for anything but a positive integer."""
    if not isinstance(hidden_size, int) or isinstance(hidden_size, bool) or hidden_size < 1:
        raise ConfigError(f"hidden_size={hidden_size!r} is not a width; give the size of x's last dimension")


def _of_the_loop(option: str, why: str) -> str:
    return f"{option} is for twinmoe's own training loop, which a layer in another does not have: {why}"


def _written(section: Any) -> Any:
    """What a section says itself, so that a scheme may fill in the rest."""
    return (
        section.model_dump(mode="json", exclude_unset=True)
        if isinstance(section, MoeConfig | ParallelConfig)
        else section
    )
