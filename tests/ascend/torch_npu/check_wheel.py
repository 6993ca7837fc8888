"""The recorded schemas against the real torch-npu wheel, without an NPU or CANN: a step of continuous integration.

    python tests/ascend/torch_npu/check_wheel.py [FOLDER]

Downloads the wheel into FOLDER (build/torch_npu), builds stand-ins for CANN's libraries, and in a fresh process:
compares schemas, asks which operators are differentiable, runs every call on `meta`, and then the contract tests
with values and gradients under the real schemas.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from twinmoe.testing.ascend.torch_npu import stub_cann

VERSION = "2.13.0"
TESTS = Path(__file__).with_name("test_ops.py")


def main(folder: Path) -> None:
    wheel, stubs = folder.resolve() / "wheel", folder.resolve() / "stubs"
    if not (wheel / "torch_npu").exists():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(wheel)]
        subprocess.run([*install, f"torch-npu=={VERSION}"], check=True)
    print(f"{stub_cann.build(wheel, stubs)} symbols of CANN stood in for", flush=True)
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(wheel), "LD_LIBRARY_PATH": str(stubs)}
    environment.pop("ASCEND_HOME_PATH", None)
    for arguments in (["--inside"], ["--inside", "--tests"]):
        subprocess.run([sys.executable, __file__, *arguments], env=environment, check=True)


def inside() -> None:
    """In the process that loads the real library."""
    import torch
    import torch_npu  # noqa: F401  # pyright: ignore[reportMissingImports]
    from twinmoe.testing.ascend.torch_npu import npu_on_host

    for name, recorded in npu_on_host.SCHEMAS.items():
        real = getattr(torch.ops.npu, name).default._schema
        own = torch._C.parse_schema(f"npu::{recorded}")
        assert str(real) == str(own), f"{name} is now\n{real}\nnot\n{own}"
        derivative = torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "AutogradPrivateUse1")
        assert derivative or name not in npu_on_host.DIFFERENTIABLE, f"{name} has lost its derivative"
        print(f"{name}: schema as recorded, {'with' if derivative else 'no'} derivative")
    on_meta()


def on_meta() -> None:
    """Shapes that the real library infers for our calls; fusion attention's asks a device which chip it is."""
    import torch
    from twinmoe.ascend.torch_npu import kernels

    def blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ends = blank(4, dtype=torch.int64)
    calls = {
        (64, 48): lambda: kernels.grouped_rows(blank(64, 32), blank(4, 32, 48), ends),
        (4, 32, 48): lambda: kernels.grouped_weights(blank(64, 32), blank(64, 48), ends),
        (64, 24): lambda: kernels.swiglu(blank(64, 48)),
        (8, 32): lambda: kernels.unpermute(blank(17, 32), blank(16, dtype=torch.int32), blank(8, 2)),
        (64, 16): lambda: kernels.rms_norm(blank(64, 16), blank(16), 1e-6),
    }
    for shape, call in calls.items():
        assert tuple(call().shape) == shape, f"{tuple(call().shape)} is not {shape}"
    print(f"{len(calls)} calls on meta")


if __name__ == "__main__":
    if "--tests" in sys.argv:
        import pytest
        import torch_npu  # noqa: F401  # pyright: ignore[reportMissingImports]

        sys.exit(pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", str(TESTS)]))
    elif "--inside" in sys.argv:
        inside()
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/torch_npu"))
