"""One rank of a job of the contract tests: runs every scenario and leaves its results in a file.

python comm_worker.py BACKEND RANK SIZE PORT FOLDER
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from twinmoe.backends import registry
from twinmoe.backends.protocol import Launch
from twinmoe.testing.contract.adapters import adapter_of
from twinmoe.testing.contract.comm_cases import run_all


def main(name: str, rank: int, size: int, port: int, folder: Path) -> None:
    backend = registry.load(name, decided_by="test")
    comm = backend.comm.connect(Launch(rank, size, rank, size, port=port, timeout_s=60))
    results = run_all(backend, comm, adapter_of(name))
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(results))
    comm.close()
    sys.stdout.flush()
    os._exit(0)  # a process that used many gloo features may abort while the interpreter shuts down


if __name__ == "__main__":
    backend_name, *numbers, results_folder = sys.argv[1:]
    this, world_size, at_port = map(int, numbers)
    main(backend_name, this, world_size, at_port, Path(results_folder))
