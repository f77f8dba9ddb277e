"""The shape of the house: who may import whom, what an import costs, and that public names are explained."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

SOURCE = Path(batchnorm.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# Imports run from right to left; a room may also import from itself.
ORDER = (
    "common",
    "ops",
    "functional",
    "nn",
    "population",
    "lightning",
    "surgery",
    "recipe",
    "bench",
    "racing",
    "experiments",
    "cli",
)
TOP = ("__init__", "__main__")  # may import everything


def room(path: Path) -> str:
    """The file or folder right under src/batchnorm that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a file imports anything from, at the top or inside a function."""
    package = ("batchnorm", *path.relative_to(SOURCE).parent.parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            names += [f"{module}.{alias.name}" for alias in node.names]
    rooms = {name.split(".")[1] if "." in name else "__init__" for name in names if name.split(".")[0] == "batchnorm"}
    return {r if r in ORDER else "__init__" for r in rooms}  # `from batchnorm import batch_norm` is the top


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    place = room(path)
    assert place in (*ORDER, *TOP), f"{path} has no place yet: put {place} into ORDER"
    if place not in TOP:
        allowed = ORDER[: ORDER.index(place) + 1]
        assert imported_rooms(path) <= set(allowed), f"{place} stands on {', '.join(allowed[:-1]) or 'torch alone'}"


def test_imports_are_found_in_every_spelling(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "nn").mkdir()
    file = tmp_path / "nn" / "new.py"
    for line, expected in {
        "import batchnorm.cli.race": "cli",
        "from batchnorm.cli import race": "cli",
        "from batchnorm import racing": "racing",
        "from batchnorm import batch_norm": "__init__",
        "import batchnorm as bn": "__init__",
        "from ..surgery import fold": "surgery",
        "from . import norm": "nn",
        "def f():\n    from ..ops.reference import statistics": "ops",
    }.items():
        file.write_text(line)
        assert imported_rooms(file) == {expected}, line


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    definitions = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    overloads = [n for n in definitions if any(getattr(d, "id", "") == "overload" for d in n.decorator_list)]
    public = [n for n in definitions if not n.name.startswith("_") and n not in overloads]
    missing = [n.name for n in public if not ast.get_docstring(n)]
    assert ast.get_docstring(tree), f"{path}: say what the file is for"
    assert not missing, f"{path}: {', '.join(missing)}"


def test_the_front_door_names_what_is_there():
    assert [n for n in batchnorm.__all__ if not getattr(batchnorm, n, None)] == []
    assert sorted(batchnorm.__all__, key=str.casefold) == sorted(set(batchnorm.__all__), key=str.casefold)
    assert batchnorm.__version__ == importlib.metadata.version("batchnorm")


def test_importing_costs_little_more_than_torch():
    script = "import sys, torch; before = set(sys.modules); import batchnorm; print(*set(sys.modules) - before)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    new = {name.split(".")[0] for name in output.split()} - set(sys.stdlib_module_names)
    assert new == {"batchnorm"}


def test_every_file_is_in_the_table_and_no_other() -> None:
    """docs/architecture.md: `room/a.py`, `b.py` in a row, or `room/` where its files are alike."""
    page = (SOURCE.parent.parent / "docs" / "architecture.md").read_text().partition("## Decisions")[0]
    named = set()
    for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", row)
        folder = first.rpartition("/")[0]
        named |= {first, *(name if "/" in name else f"{folder}/{name}".lstrip("/") for name in others)}
    whole = {name.removesuffix("*.py").rstrip("/") for name in named if name.endswith(("/", "*.py"))}
    files = {str(path.relative_to(SOURCE)) for path in FILES if not path.stem.startswith("__")}
    assert {file for file in files if file not in named and room(SOURCE / file) not in whole} == set()
    assert {name for name in named if "*" not in name and not (SOURCE / name).exists()} == set()
