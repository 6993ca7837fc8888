"""Sequential kernels, compiled by numba where it is installed; the same Python code runs without it.

Modules of kernels (`spill`, `placement`, `route_kernel`) are imported by the functions that call them: numba takes a
quarter of a second and 70 MB, which static plans should not cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

try:
    import numba
except ImportError:
    numba = None

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

COMPILED = numba is not None
"""Whether kernels are machine code in this process. Results do not depend on it."""


def jit(kernel: Kernel) -> Kernel:
    """Compile on first use, without the interpreter lock; keep the machine code on disk where that is possible."""
    if numba is None:
        return kernel
    try:
        return cast(Kernel, numba.njit(nogil=True, cache=True)(kernel))
    except RuntimeError:  # no folder that can be written
        return cast(Kernel, numba.njit(nogil=True)(kernel))
