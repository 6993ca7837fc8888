"""How fast a device computes rows, from `bench layer` alone: lines through its measurements, scaled to other shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .combinations import ConfigError
from .config import Config
from .planners.budget import LayerShape
from .planning import layer_shape


@dataclass(frozen=True)
class Line:
    """Seconds of a layer's experts on one rank: fixed + rows x per_row + experts x per_expert (launches, weights)."""

    fixed: float = 0.0
    per_row: float = 0.0
    per_expert: float = 0.0

    def seconds(self, rows: np.ndarray | float, experts: np.ndarray | float) -> Any:
        return self.fixed + rows * self.per_row + experts * self.per_expert

    def scaled(self, factor: float) -> Line:
        """Of experts with so many times the parameters: rows and weights cost as much more."""
        return replace(self, per_row=self.per_row * factor, per_expert=self.per_expert * factor)


@dataclass(frozen=True)
class Rates:
    """forward, backward: of one rank's experts; expert_parameters: of the experts that were measured.

    per_parameter: seconds of the optimizer; per_byte: of bringing rows or weights into another order on a device. note:
    where they come from.
    """

    forward: Line
    backward: Line
    expert_parameters: int
    per_parameter: float = 0.0
    per_byte: float = 0.0
    note: str = ""

    def of(self, shape: LayerShape) -> Rates:
        """For experts of this shape, by the floating-point operations of a row."""
        wanted = shape.matrices * shape.hidden_size * shape.expert_hidden_size
        if wanted == self.expert_parameters:
            return self
        factor = wanted / self.expert_parameters
        note = f"{self.note}, scaled {factor:.3g} times by parameters"
        return replace(
            self,
            forward=self.forward.scaled(factor),
            backward=self.backward.scaled(factor),
            expert_parameters=wanted,
            note=note,
        )

    @property
    def flops_per_second(self) -> float:
        """Of forward and backward together, where rows are many."""
        seconds = self.forward.per_row + self.backward.per_row
        return 6.0 * self.expert_parameters / seconds if seconds else float("inf")


def rates_of_teraflops(teraflops: float, shape: LayerShape, per_parameter: float = 0.0) -> Rates:
    """Rows at a nominal speed, backward twice as long as forward. per_parameter: of the optimizer."""
    parameters = shape.matrices * shape.hidden_size * shape.expert_hidden_size
    row = 2.0 * parameters / (teraflops * 1e12)
    note = f"{teraflops:g} TFLOP/s"
    return Rates(Line(per_row=row), Line(per_row=2 * row), parameters, per_parameter, note=note)


def rates_of_bench(reports: Sequence[Mapping[str, Any]], shape: LayerShape, ops: str = "fused") -> Rates:
    """Lines through the rows of `bench layer --json` reports, of the experts nearest in size to `shape`.

    A line has as many terms as the points allow: rows alone for one point, then the experts, then a fixed part.
    ConfigError where there is no row of these operations.
    """
    points = [(report["tokens"], row) for report in reports for row in report["rows"] if row["ops"] == ops]
    if not points:
        raise ConfigError(
            f"the reports of bench layer hold no rows of {ops} operations; run `twinmoe bench layer --json`"
        )
    near = _nearest(points, shape)
    parameters = near[0][1]["hidden_size"] * near[0][1]["expert_hidden_size"]
    rows = np.array([t * r["top_k"] for t, r in near], float)
    experts = np.array([r["num_experts"] for _, r in near], float)
    forward = np.array([1e-3 * r["forward_milliseconds"] for _, r in near])
    both = np.array([1e-3 * r["milliseconds"] for _, r in near])
    updates = [1e-3 * r["optimizer_milliseconds"] / r["parameters"] for _, r in near if r.get("optimizer_milliseconds")]
    copies = [r["copy_seconds_per_gib"] / 2**30 for _, r in near if r.get("copy_seconds_per_gib")]
    return Rates(
        forward=_line(rows, experts, forward),
        backward=_line(rows, experts, both - forward),
        expert_parameters=shape.matrices * parameters,
        per_parameter=float(np.median(updates)) if updates else 0.0,
        per_byte=float(np.median(copies)) if copies else 0.0,
        note=f"bench layer, {len(near)} points",
    ).of(shape)


def _nearest(points: Sequence[tuple[int, Any]], shape: LayerShape) -> list[tuple[int, Any]]:
    """The points of one pair of widths: of the experts nearest in parameters, and there of the nearest width."""

    def distance(widths: tuple[int, int]) -> tuple[float, float]:
        parameters = widths[0] * widths[1] / (shape.hidden_size * shape.expert_hidden_size)
        return abs(float(np.log(parameters))), abs(float(np.log(widths[0] / shape.hidden_size)))

    found = [((r["hidden_size"], r["expert_hidden_size"]), (t, r)) for t, r in points]
    best = min((widths for widths, _ in found), key=distance)
    return [point for widths, point in found if widths == best]


def _line(rows: np.ndarray, experts: np.ndarray, seconds: np.ndarray) -> Line:
    """Non-negative least squares of relative errors; a point far below the median is noise and gets no more weight."""
    from scipy.optimize import nnls

    columns = [rows, experts, np.ones_like(rows)]
    distinct = len({*zip(rows.tolist(), experts.tolist())})
    terms = [0] if distinct == 1 else [0, 1, 2] if len(set(experts.tolist())) > 1 else [0, 2]
    table = np.stack([columns[i] for i in terms], 1)
    weight = 1 / np.maximum(seconds, max(0.1 * float(np.median(seconds)), 1e-9))
    scale = table.max(0)
    solved, _ = nnls(table / scale * weight[:, None], seconds * weight)
    found = dict(zip(terms, (solved / scale).tolist()))
    return Line(fixed=found.get(2, 0.0), per_row=found.get(0, 0.0), per_expert=found.get(1, 0.0))


def shape_of(config: Config, element_bytes: int) -> LayerShape:
    """The layer of a config, as budgets and rates know it."""
    moe = config.moe
    width = moe.head_dim if moe.num_heads > 1 and moe.head_dim else config.model.hidden_size
    return layer_shape(moe, width, element_bytes)
