"""The arrows: who may import whom, who may read the environment, and that the package is what the tree says."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("moe_core", "backends", "cuda", "ascend", "configs")
MAY_IMPORT = {
    "moe_core": {"moe_core", "backends"},
    "backends": {"backends"},
    "cuda": {"cuda", "backends"},
    "ascend": {"ascend", "backends"},
    "configs": set(),
}
FRAMEWORKS = {"torch", "mindspore", "torch_npu", "triton", "cuda"}
FREE_OF_FRAMEWORKS = ("moe_core", "backends/registry.py", "backends/launchers.py", "backends/protocol.py")
READS_THE_ENVIRONMENT = {"backends/registry.py"}
RUN_CODE = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def sources(*places: str) -> list[Path]:
    found: list[Path] = []
    for place in places:
        path = ROOT / place
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, wherever it stands; relative ones as paths from the root: backends.protocol."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            module = [*base, *((node.module or "").split(".") if node.module else [])]
            yield from ((".".join([*module, alias.name]), node.lineno) for alias in node.names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_whom_they_may(folder: str) -> None:
    wrong = []
    for path in sources(folder):
        for module, line in imported(path):
            top = module.split(".")[0]
            if top == "twinmoe":
                wrong.append(f"{name(path)}:{line} imports {module}; inside the package imports are relative")
            elif (
                top in FOLDERS and top not in MAY_IMPORT[folder] and not (top == "cuda" and module.startswith("cuda.b"))
            ):
                wrong.append(f"{name(path)}:{line} imports {module}")
    assert wrong == []


def test_the_core_knows_of_backends_only_the_contract_the_registry_and_the_reference() -> None:
    allowed = ("backends.protocol", "backends.registry", "backends.reference")
    wrong = [
        f"{name(path)}:{line} imports {module}"
        for path in sources("moe_core")
        for module, line in imported(path)
        if module.startswith("backends") and not module.startswith(allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize("place", FREE_OF_FRAMEWORKS)
def test_no_framework_is_imported_by_name(place: str) -> None:
    wrong = [
        f"{name(path)}:{line} imports {module}"
        for path in sources(place)
        for module, line in imported(path)
        if module.split(".")[0] in FRAMEWORKS
    ]
    assert wrong == []


def test_planners_are_arithmetic() -> None:
    """NumPy, numba and SciPy, plans and each other; of the rest of the package only its config's types."""
    allowed = ("moe_core.plan", "moe_core.planners", "moe_core.config", "moe_core.topology")
    outside = {"numpy", "numba", "scipy"} | set(sys.stdlib_module_names) - {"os", "random", "time", "threading"}
    excused = {("moe_core/planners/background.py", "time")}  # reports how long a late layout was waited for
    wrong = [
        f"{name(path)}:{line} imports {module}"
        for path in sources("moe_core/planners")
        for module, line in imported(path)
        if not module.startswith(allowed)
        and module.split(".")[0] not in outside
        and (name(path), module) not in excused
    ]
    assert wrong == []


def test_the_environment_is_read_in_one_file() -> None:
    wrong = []
    for path in sources(*FOLDERS):
        for node in ast.walk(tree(path)):
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
            reads |= isinstance(node, ast.ImportFrom) and any(a.name in ("environ", "getenv") for a in node.names)
            if reads and name(path) not in READS_THE_ENVIRONMENT:
                wrong.append(f"{name(path)}:{getattr(node, 'lineno', 0)}")
    assert wrong == []


def test_nothing_is_unpickled() -> None:
    """np.load says itself that it takes no pickles; torch.load does not occur; YAML goes through one safe loader."""
    wrong = []
    for path in sources(*FOLDERS):
        wrong += [f"{name(path)}:{line}" for module, line in imported(path) if module.split(".")[0] in RUN_CODE]
        for node in ast.walk(tree(path)):
            refuses = isinstance(node, ast.Call) and any(
                word.arg == "allow_pickle" and isinstance(word.value, ast.Constant) and word.value.value is False
                for word in node.keywords
            )
            if isinstance(node, ast.Call) and any(w.arg == "allow_pickle" for w in node.keywords) and not refuses:
                wrong.append(f"{name(path)}:{node.lineno} allow_pickle")
            if isinstance(node, ast.Call) and _runs_code(node.func, name(path)) and not refuses:
                wrong.append(f"{name(path)}:{node.lineno} {ast.unparse(node.func)}")
    assert wrong == []


def _runs_code(function: ast.expr, path: str) -> bool:
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return False
    owner, attribute = function.value.id, function.attr
    loads = attribute in ("load", "unsafe_load", "full_load", "load_all", "unsafe_load_all")
    return loads and (owner in ("torch", "np", "numpy") or (owner == "yaml" and path != "moe_core/yaml_text.py"))


def test_importing_every_core_module_imports_no_framework() -> None:
    modules = [".".join(("twinmoe", *p.relative_to(ROOT).with_suffix("").parts)) for p in sources("moe_core")]
    modules = [m.removesuffix(".__init__") for m in modules]
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\n"
    code += f"assert not set(sys.modules) & {FRAMEWORKS}, set(sys.modules) & {FRAMEWORKS}\nprint(len({modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(modules) > 20


def test_plain_moe_core_is_refused() -> None:
    code = "import moe_core"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode != 0
    assert "import twinmoe.moe_core" in done.stderr


def test_the_package_list_is_the_tree() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    folders = {path.parent for path in sources(*FOLDERS)} | {ROOT / "cuda", ROOT / "configs"}
    expected = {".".join(("twinmoe", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert listed == expected | {"twinmoe.testing"}


def test_every_kind_of_config_is_packaged() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["twinmoe.configs"].split()
    packaged = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert packaged == set((ROOT / "configs").rglob("*.yaml"))


def test_no_package_marker_hides_nvidias_namespace() -> None:
    assert not (ROOT / "cuda" / "__init__.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_cuda_bindings_and_our_cuda_live_side_by_side() -> None:
    """In a fresh interpreter at the root, where the folder `cuda` lies on the path."""
    if not any(name == "cuda-bindings" for name in map(str.lower, packages_distributions().get("cuda", []))):
        pytest.skip("cuda-bindings is not installed (it has wheels for Linux and Windows only)")
    code = "import cuda, cuda.bindings, twinmoe.cuda; assert getattr(cuda, '__file__', None) is None; print('both')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "both", done.stderr
