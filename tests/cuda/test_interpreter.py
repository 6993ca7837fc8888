"""Runs every `interpreted_*.py` beside this file in Triton's interpreter, each in a process of its own.

The interpreter is chosen when triton is imported, so it cannot share a process with the compile tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.processes
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_kernels_match_their_formulas_in_the_interpreter(path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        str(path),
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
