"""The warp-specialised kernels compile for sm_90 without a GPU: shared memory fits, wgmma is used, no spills."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from twinmoe.cuda.kernels import launch_router, router, small
from twinmoe.cuda.kernels import launch_specialised as special
from twinmoe.cuda.kernels.config import HOPPER, Ring
from twinmoe.cuda.kernels.grouping import _route_by_torch

BF16, T, D, F, E, K = torch.bfloat16, 300, 256, 256, 4, 2
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class StandIn:
    """A driver that reports an H100 and launches nothing."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What launches compile to, instead of launching."""
    kernels: list[Any] = []

    def compile_only(kernel: Any, ring: Ring, programs: int, *args: Any, **constants: Any) -> None:
        kernels.append(
            kernel.warmup(
                *args, STAGES=ring.stages, OUTS=ring.outs, GROUP=ring.group, GRID=programs, num_warps=8, maxnreg=168,
                grid=(programs,), **constants,
            )
        )  # fmt: skip

    monkeypatch.setattr(special, "_run", compile_only)
    monkeypatch.setattr(driver, "_active", StandIn())
    return kernels


def random(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=BF16)


def ring(name: str) -> Ring:
    found = getattr(HOPPER.rings, name)
    assert found is not None
    return found


def kernels() -> dict[str, Callable[[], Any]]:
    routing = _route_by_torch(torch.arange(T * K).reshape(T, K) % E, E, 128)
    sorted_rows, n = routing.grouping, T * K
    x, w_up, w_down, weights = random(T, D), random(E, D, 2 * F), random(E, F, D), torch.ones(T, K)
    rows, h, act = random(n, D), random(n, 2 * F), random(n, F)
    return {
        "up_routed": lambda: special.up(x, w_up, routing, n, True, ring("up"), 132),
        "up_sorted": lambda: special.up(rows, w_up, sorted_rows, n, True, ring("up"), 132),
        "down": lambda: special.rows(act, w_down, sorted_rows, False, ring("down"), 132),
        "dx": lambda: special.rows(h, w_up, sorted_rows, True, ring("dx"), 132),
        "act_routed": lambda: special.activation_grad(x, w_down, h, weights, routing, ring("act"), 132),
        "act_sorted": lambda: special.activation_grad(rows, w_down, h, None, sorted_rows, ring("act"), 132),
        "dw_up_routed": lambda: special.weight_grad(x, h, routing, "a", ring("dw_up"), 132),
        "dw_down_routed": lambda: special.weight_grad(act, x, routing, "b", ring("dw_down"), 132),
        "dw_sorted": lambda: special.weight_grad(act, rows, sorted_rows, "", ring("dw_down"), 132),
    }


@pytest.mark.parametrize("name", list(kernels()))
def test_kernel_fits_an_h100(built: list[Any], tmp_path: Path, name: str) -> None:
    kernels()[name]()
    (kernel,) = built
    check(kernel, tmp_path)


def check(kernel: Any, tmp_path: Path) -> None:
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [str(TOOL), "-sass", str(tmp_path / "kernel.cubin")]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert kernel.metadata.shared <= 227 * 1024
    assert kernel.asm["ptx"].count("wgmma.mma_async") > 0
    assert len(re.findall(r"\bSTL\b", sass)) <= 2, "a value or two saved outside the loop at most"


class CompileOnly:
    """kernel[grid](...) compiles and remembers."""

    def __init__(self, kernel: Any, built: list[Any]) -> None:
        self._kernel, self._built = kernel, built

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **constants: self._built.append(self._kernel.warmup(*args, grid=grid, **constants))


def route_at_compile_time(experts: int, precision: router.Precision, biased: bool) -> None:
    """Choose, then look up: two kernels."""
    x, w, choice = random(256, 2, 128), torch.zeros(2, 128, experts), router.Selection(8, precision)
    terms, on = router.split_weights(w, BF16, precision), router.schedule_for(experts, 90, 132)
    router._choose(x, terms, torch.zeros(2, experts) if biased else None, experts, choice, on)
    router._look_up(x, terms, torch.zeros((256, 2, 8), dtype=torch.int64), experts, on)


def test_router_kernels_of_few_experts_fit_an_h100(built: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("choose_kernel", "given_kernel"):
        monkeypatch.setattr(router, name, CompileOnly(getattr(router, name), built))
    route_at_compile_time(64, "float32", biased=True)
    assert len(built) == 2
    for kernel in built:
        assert kernel.metadata.shared <= 227 * 1024
        assert kernel.asm["ptx"].count("wgmma.mma_async") > 0


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bf16_fp32acc"])
@pytest.mark.parametrize("experts", [128, 1000])
def test_the_specialised_router_fits_an_h100(
    built: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int, precision: Any, biased: bool
) -> None:
    only = CompileOnly(launch_router.router_specialised, built)
    monkeypatch.setattr(launch_router, "router_specialised", only)
    route_at_compile_time(experts, precision, biased)
    assert len(built) == 2
    for kernel in built:
        check(kernel, tmp_path)


@pytest.mark.parametrize("width", sorted(small.NARROW))
def test_kernels_of_narrow_experts_fit_an_h100(built: list[Any], monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    for name in ("small_forward_kernel", "small_token_grad_kernel", "small_weight_grad_kernel"):
        monkeypatch.setattr(small, name, CompileOnly(getattr(small, name), built))
    monkeypatch.setattr(small, "gather_sum", lambda rows, position, weights: rows[: position.shape[0]])
    on = small.narrow_schedule(width, 132)
    routing = _route_by_torch(torch.arange(T * K).reshape(T, K) % E, E, on.block_m)
    leaves = [random(T, width), torch.ones(T, K), random(E, width, 2 * F), random(E, F, width)]
    y = small.SmallMlp.apply(*(leaf.requires_grad_() for leaf in leaves), routing, on)
    torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert len(built) == 3
    for kernel in built:
        assert kernel.metadata.shared <= 227 * 1024
        assert kernel.asm["ptx"].count("wgmma.mma_async") > 0
