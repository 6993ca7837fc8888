"""Libraries that stand in for CANN's, so that the real torch-npu wheel imports: every symbol it misses returns 0.

Needs gcc and nm. Good for schemas and for shapes on `meta`; nothing reaches a device.
"""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path

LIBRARIES = ("libhccl", "libascendcl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel")
SYSTEM = (
    "libstdc++.so.6",
    "libc.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
)
ELSEWHERE = ("Py", "_Py", "_ITM", "__gmon", "__cxa_finalize")
"""Prefixes of symbols that the interpreter and the C runtime provide."""


def build(wheel: Path, folder: Path) -> int:
    """Write the libraries for the torch-npu unpacked in `wheel` into `folder`; returns the number of symbols."""
    folder.mkdir(parents=True, exist_ok=True)
    own = sorted((wheel / "torch_npu").glob("_C*.so")) + [
        wheel / "torch_npu" / "lib" / f"{name}.so" for name in ("libtorch_npu", "libtensorpipe", "libnpu_profiler")
    ]
    torch_lib = Path(sysconfig.get_paths()["purelib"]) / "torch" / "lib"
    providers = [*torch_lib.glob("*.so*"), *own, *map(_system_library, SYSTEM)]
    provided = {name.split("@")[0] for name in _symbols(providers, "--defined-only")}
    wanted = {name for name in _symbols(own, "--undefined-only") if "@" not in name and not name.startswith(ELSEWHERE)}
    missing = sorted(wanted - provided)
    source = folder / "stub.c"
    source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in missing))
    _link(folder / "libcann_stub.so", source)
    empty = folder / "empty.c"
    empty.write_text("")
    for name in LIBRARIES:
        _link(folder / f"{name}.so", empty, "-Wl,--no-as-needed", f"-L{folder}", "-lcann_stub", "-Wl,-rpath,$ORIGIN")
    return len(missing)


def _symbols(files: Iterable[Path], which: str) -> set[str]:
    found: set[str] = set()
    for file in files:
        listing = subprocess.run(["nm", "-D", which, str(file)], capture_output=True, text=True, check=False).stdout
        found |= {line.split()[-1] for line in listing.splitlines()}
    return found


def _system_library(name: str) -> Path:
    answer = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return Path(answer.stdout.strip())


def _link(target: Path, source: Path, *options: str) -> None:
    flags = ["-w", "-O0", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{target.name}"]
    subprocess.run(["gcc", *flags, "-o", str(target), str(source), *options], check=True)
