"""Wheel and sdist: what is in them, and that they run in an environment without the repository."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("moe_core", "backends", "cuda", "ascend", "configs", "tests")
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def files_of(folder: str) -> set[Path]:
    """What a package holds: no pages, nothing that Python and numba leave behind."""
    files = {path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".md"}
    return {path for path in files if "__pycache__" not in path.parts}


def run(*words: str, cwd: Path, seconds: float = 300) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_of_a_package_is_packaged() -> None:
    """What is no Python is named as package data; each package says that it has types."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    options = setup["options.package_data"]
    patterns = {key.removeprefix("twinmoe."): options[key].replace(",", " ").split() for key in options}
    for folder in FOLDERS[:-1]:
        named = {path for pattern in patterns.get(folder, []) for path in (ROOT / folder).glob(pattern)}
        others = {path for path in files_of(folder) if path.suffix not in (".py", ".typed")}
        assert others - named == set(), "name these in setup.cfg"
        assert (ROOT / folder / "py.typed").exists()


def test_extras_are_those_that_pages_promise() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    assert {"cuda", "ascend", "ascend-torch", "hf", "report", "wandb", "dev"} <= extras


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist, built from a copy of the sources."""
    if not all(map(find_spec, ("build", "twine", "setuptools"))):
        pytest.skip("build, twine or setuptools are not installed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), ".", cwd=source, seconds=600)
    return out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_pass_twine_and_hold_types_configs_and_the_report(built: Path) -> None:
    files = [str(path) for path in built.iterdir()]
    assert len(files) == 2
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=built)
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    for folder in FOLDERS[:-1]:
        ours = {path.relative_to(ROOT).as_posix() for path in files_of(folder)}
        assert {name for name in ours if f"twinmoe/{name}" not in names} == set()
        assert {name for name in ours if name not in held} == set()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(900)
def test_the_wheel_trains_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    """Nothing of the repository is on its path. What it depends on is lent by a line in a .pth file, whose own
    .pth files (the editable installation) do not count."""
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    wheel = str(next(built.glob("*.whl")))
    run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    place = run(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip()
    Path(place, "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    twinmoe = str(tmp_path / "venv" / "bin" / "twinmoe")
    where = run(str(python), "-c", "import twinmoe.moe_core as m; print(m.__file__)", cwd=tmp_path)
    assert where.startswith(place)
    words = ["train.steps=2", "backend=cpu", "--nproc", "2", "--run-dir", "run", "--json"]
    summary = json.loads(run(twinmoe, "train", "quickstart", *words, cwd=tmp_path, seconds=600).splitlines()[-1])
    assert (summary["steps"], summary["world_size"]) == (2, 2)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2
    if find_spec("plotly"):
        assert json.loads(run(twinmoe, "report", "run", "--json", cwd=tmp_path).splitlines()[-1])["runs"] == ["run"]
