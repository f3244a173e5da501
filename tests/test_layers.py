"""The one-way order of the package, and what importing it costs."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "axolotl_dskd"

#: What every unit may know.
NOUNS = {"output_head", "supervision", "types"}

#: unit -> units of ours that it may import
ALLOWED = {
    "output_head": set(),
    "types": set(),
    "supervision": set(),
    "machine": set(),
    "ranks": set(),
    "progress": set(),
    "config": set(),
    "cache": set(),
    "losses": set(),
    "models": {"ranks"},
    "generation": {"config", "ranks", "servers", "vllm"},
    "evaluation": {"config", "generation", "losses", "ranks"},
    "data": {"config"},
    "samples": {"cache", "config", "data", "generation", "ranks"},
    "objectives": {"cache", "config", "data", "losses", "ranks"},
    "servers": {"config"},
    "vllm": {"servers"},
    "virtual_attention": {"config", "data", "losses", "ranks"},
    "teacher": {"cache", "config", "losses", "models", "progress", "ranks", "servers", "vllm"},
    "planning": {
        *("config", "evaluation", "losses", "models", "objectives", "progress", "teacher"),
        *("virtual_attention",),
    },
    # They join the units; nothing but the plugin and the command line knows them.
    "training": {
        *("config", "data", "evaluation", "generation", "losses", "machine", "models"),
        *("objectives", "ranks", "samples", "servers", "teacher", "virtual_attention", "vllm"),
    },
    "commands": {
        *("cache", "config", "data", "evaluation", "losses", "machine", "models", "objectives"),
        *("planning", "progress", "samples", "teacher", "virtual_attention"),
    },
}
LONGEST_MODULE = 350


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("axolotl_dskd."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {
                a.name.split(".")[1] for a in node.names if a.name.startswith("axolotl_dskd.")
            }
    return names


def module_name(path: Path) -> str:
    return ".".join(
        ("axolotl_dskd", *path.relative_to(PACKAGE).with_suffix("").parts)
    ).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """What a module of ours imports when it is imported, as far as it is ours."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("axolotl_dskd")}


@pytest.mark.parametrize("unit", ALLOWED)
def test_imports_go_one_way(unit: str):
    folder = PACKAGE / unit
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{unit}.py"]
    assert files
    for path in files:
        assert imports(path) <= ALLOWED[unit] | {unit, *NOUNS}, path


def test_units_do_not_import_each_other_in_a_circle():
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())  # raises CycleError
    assert set(order) == set(ALLOWED)


def test_modules_do_not_import_each_other_in_a_circle():
    names = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: imported_modules(path) & names.keys() for name, path in names.items()}
    # A package's `__init__` hands on what stands below it; who is below never asks it.
    for name in graph:
        graph[name] -= {name, *(up for up in graph if name.startswith(f"{up}."))}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_no_module_is_too_long_to_be_read():
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {path: n for path, n in lengths.items() if n > LONGEST_MODULE}


def test_every_unit_has_its_place_in_the_order():
    units = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert units == {*ALLOWED, "__init__", "plugin"}


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, axolotl_dskd; axolotl_dskd.__version__;"
        "print(sorted({'torch', 'transformers', 'axolotl'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_nothing_is_unpickled():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "torch.load" not in text, path
        assert "import pickle" not in text, path


def test_nothing_is_imported_from_a_test_module():
    tests = Path(__file__).parent
    paths = sorted(tests.rglob("*.py"))
    assert paths
    for path in paths:
        names: list[str] = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path} imports from a relative module"
                names += [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            taken = name.startswith("tests.") and not name.startswith("tests.support")
            assert not taken, f"{path} imports {name}: move what they share to tests/support/"
