"""Plans under skew on virtual ranks, no model run: rows, bytes and memory of the busiest rank. Run by hand:

python tests/bench/skew_plans.py            # markdown tables of the published layers
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from twinmoe.moe_core.planners.least_loaded import LeastLoadedOptions
from twinmoe.moe_core.planners.skew import DEEPSEEK_V3, GPT_OSS_120B, Skew, SkewRun, balanced, skew_table

LAYERS = {"gpt-oss-120b": (GPT_OSS_120B, 32768), "DeepSeek-V3": (DEEPSEEK_V3, 16384)}
"""Shape, tokens per rank, as the LLEP paper runs them on 8 ranks."""
PARTS = (30, 50, 80, 95)


def published(hots: Sequence[int]) -> list[Skew]:
    return [Skew(Fraction(part, 100), hot) for hot in hots for part in PARTS]


def line(row: dict[str, Any]) -> str:
    skew = "balanced" if row["hot"] > 100 else f"{100 * row['part']:.0f} % on {row['hot']}"
    mark = "" if row["distinct"] else " (*)"
    sizes = (f"{row[name] / 1e9:.2f}" for name in ("dispatch_bytes", "weight_bytes", "peak_bytes"))
    cells = (skew + mark, row["plan"], row["rows"], f"{row['ratio']:.2f}", f"{row['crossing']:.3f}", *sizes)
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    for name, (shape, tokens) in LAYERS.items():
        run = SkewRun(shape, tokens, extra_slots=4, least_loaded=LeastLoadedOptions())
        hots = (1, 4, 16) if shape is GPT_OSS_120B else (1, 8, 16)
        print(f"\n**{name}**, {tokens} tokens a rank, top {shape.top_k}\n")
        print("| skew | plan | rows | max / mean | crossing | dispatch GB | weights GB | peak GB |")
        print("|---|---|---|---|---|---|---|---|")
        for row in skew_table(run, [balanced(shape.num_experts), *published(hots)]):
            print(line(row))


if __name__ == "__main__":
    main()
