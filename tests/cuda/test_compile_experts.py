"""Every expert kernel compiles for sm_80 and sm_90 without a GPU: shared memory fits, no spills, tensor cores used."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")
from twinmoe.cuda.kernels import gather_sum, sort_kernels
from twinmoe.cuda.kernels.config import AMPERE, HOPPER, Tile
from twinmoe.cuda.kernels.expert_backward import activation_grad_kernel, weight_grad_kernel
from twinmoe.cuda.kernels.expert_forward import rows_kernel, up_kernel

SCHEDULES = {80: AMPERE, 90: HOPPER}
LIMIT = {80: 163 * 1024, 90: 227 * 1024}


def box(*sizes: int) -> str:
    return f"tensordesc<bf16[{', '.join(map(str, sizes))}]>"


def common(tile: Tile, **constants: Any) -> dict[str, Any]:
    shared = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group, "GRID": 132, "FLATTEN": tile.flatten}
    return {**shared, **constants}


def check(built: Any, capability: int, per_sm: int = 1) -> None:
    assert (built.shared + 1024) * per_sm <= LIMIT[capability] + 1024, built
    assert built.spills == 0, built
    assert built.tensor_core > 0, built
    if capability == 90:
        assert built.wgmma > 0, built


ROWS = {"tiles_ptr": "*i32", "num_tiles_ptr": "*i32", "copies_ptr": "*i32"}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("top_k", [8, 0], ids=["gathered", "sorted"])
@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_up(compile_kernel: Any, capability: int, top_k: int, gated: bool) -> None:
    tile = SCHEDULES[capability].up
    width = tile.bn // tile.pieces
    types = {
        "x_ptr": "*bf16", "x_desc": box(tile.bm, tile.bk), "w_desc": box(tile.bk, tile.bn), "D": "i32", "F": "i32",
        "h_desc": box(1, 1, tile.bm, 1, width), "act_desc": box(1, 1, tile.bm, width), **ROWS,
    }  # fmt: skip
    constants = common(tile, TOP_K=top_k, GATED=gated, SAVE=True, PIECES=tile.pieces)
    if top_k:
        constants["x_desc"] = None
    check(compile_kernel(up_kernel, types, constants, tile.warps, tile.stages, capability), capability, tile.per_sm)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["down", "dx"])
def test_rows(compile_kernel: Any, capability: int, name: str) -> None:
    tile = getattr(SCHEDULES[capability], name)
    w_box = box(tile.bn, tile.bk) if name == "dx" else box(tile.bk, tile.bn)
    types = {
        "a_desc": box(tile.bm, tile.bk), "w_desc": w_box, "out_desc": box(1, 1, tile.bm, tile.bn // tile.pieces),
        "K": "i32", "N": "i32", **ROWS,
    }  # fmt: skip
    constants = common(tile, TRANSPOSED=name == "dx", PIECES=tile.pieces)
    check(compile_kernel(rows_kernel, types, constants, tile.warps, tile.stages, capability), capability, tile.per_sm)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("top_k", [8, 0], ids=["gathered", "sorted"])
@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_activation_grad(compile_kernel: Any, capability: int, top_k: int, gated: bool) -> None:
    tile = SCHEDULES[capability].act
    part, width = box(1, 1, tile.bm, 1, tile.bn // tile.pieces), tile.bn // tile.pieces
    types = {
        "g_ptr": "*bf16", "g_desc": box(tile.bm, tile.bk), "weight_ptr": "*fp32", "w_desc": box(tile.bn, tile.bk),
        "h_desc": part, "dh_desc": part, "act_desc": box(1, 1, tile.bm, width), "partial_ptr": "*fp32",
        "D": "i32", "F": "i32", "N": "i32", **ROWS,
    }  # fmt: skip
    constants = common(tile, TOP_K=top_k, GATED=gated, PIECES=tile.pieces)
    if top_k:
        constants["g_desc"] = None
    built = compile_kernel(activation_grad_kernel, types, constants, tile.warps, tile.stages, capability)
    check(built, capability, tile.per_sm)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "gather"), [("dw_up", "a"), ("dw_down", "b"), ("dw_up", "")])
def test_weight_grad(compile_kernel: Any, capability: int, name: str, gather: str) -> None:
    tile = getattr(SCHEDULES[capability], name)
    types = {
        "a_ptr": "*bf16", "a_desc": box(1, 1, tile.bk, tile.bm), "b_ptr": "*bf16", "out_ptr": "*bf16",
        "b_desc": box(1, 1, tile.bk, tile.bn), "order_ptr": "*i32", "offsets_ptr": "*i32",
        "M": "i32", "N": "i32", "num_experts": "i32", **ROWS,
    }  # fmt: skip
    constants = common(tile, TOP_K=8, GATHER_A=gather == "a", GATHER_B=gather == "b")
    for operand in gather:
        constants[f"{operand}_desc"] = None
    stages = tile.stages if gather else (tile.stages + 1) // 2
    built = compile_kernel(weight_grad_kernel, types, constants, tile.warps, stages, capability)
    check(built, capability, tile.per_sm)


@pytest.mark.parametrize("capability", [80, 90])
def test_sort_and_combine_compile_without_spills(compile_kernel: Any, capability: int) -> None:
    ints = {n: "*i32" for k in vars(sort_kernels).values() if hasattr(k, "arg_names") for n in k.arg_names}
    ints |= {n: "i32" for n in ("N", "E", "blocks", "max_tiles")} | {"ids_ptr": "*i64"}
    for kernel, constants in (
        (sort_kernels.count_kernel, {"BLOCK": 1024, "BINS": 1024}),
        (sort_kernels.scan_kernel, {"BINS": 1024, "ROWS": 256, "COLUMNS": 16}),
        (sort_kernels.place_kernel, {"BLOCK": 1024, "BINS": 1024, "BM": 128, "CHUNK": 16}),
        (sort_kernels.table_kernel, {"BINS": 1024, "BM": 128, "CHUNK": 16}),
    ):
        assert compile_kernel(kernel, ints, constants, 4, 3, capability).spills == 0
    types = {"rows_ptr": "*bf16", "position_ptr": "*i32", "weight_ptr": "*fp32", "out_ptr": "*bf16", "D": "i32"}
    constants = {"TOP_K": 8, "WEIGHTED": True, "BLOCK": 2048}
    assert compile_kernel(gather_sum.gather_sum_kernel, types, constants, 4, 3, capability).spills == 0
