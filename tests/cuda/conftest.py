"""Compiling kernels for a card that is not here, and reading what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Compiled:
    """What counts about a compiled kernel."""

    shared: int
    registers: int
    wgmma: int
    spills: int
    tensor_core: int


@pytest.fixture(scope="session")
def compile_kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compiled]:
    """compile_kernel(kernel, types, constants, warps, stages, capability): types of the arguments that vary."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    folder = tmp_path_factory.mktemp("cubin")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(option: str, cubin: Path) -> str:
        return subprocess.run([str(tool), option, str(cubin)], capture_output=True, text=True, check=True).stdout

    def build(
        kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int, capability: int
    ) -> Compiled:
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types[n] for n in names}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if signature[n][0] == "*" or signature[n] == "i32"
        }
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
        built = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
        )
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage, sass = dump("--dump-resource-usage", cubin), dump("-sass", cubin)
        registers = re.search(r"REG:(\d+)", usage)
        assert registers is not None, usage
        return Compiled(
            built.metadata.shared, int(registers.group(1)), built.asm["ptx"].count("wgmma.mma_async"),
            len(re.findall(r"\bSTL\b", sass)), len(re.findall(r"\bH?G?MMA\b|\bHMMA\b|\bHGMMA\b", sass)),
        )  # fmt: skip

    return build
