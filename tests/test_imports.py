"""Imports go one way: a room imports only from rooms below it (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "exl2jax"

LEVELS = {
    "errors": 0,
    "types": 0,
    "version": 0,
    "qparams": 1,
    "stock_tables": 2,
    "ops": 2,
    "pallas": 3,
    "variants": 3,
    "storage": 3,
    "calibration": 4,
    "contrib": 4,
    "models": 4,
    "stream": 5,
    "testing": 8,
    "quantize": 6,
    "generation": 6,
    "measure": 7,
    "exl2": 7,
    "evaluation": 7,
    "allocate": 8,
    "estimate": 8,
    "conversion": 9,
    "report": 10,
    "hub": 11,
    "lab": 11,
    "__init__": 11,
    "cli": 12,
    "__main__": 13,
}
"""Height of every room. Rooms of one height do not import each other."""

FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """The top-level room of a dotted module name inside the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(path: Path, package: str = "exl2jax") -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of a package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == package)


def test_every_room_has_a_level() -> None:
    rooms = {p.stem if p.suffix == ".py" else p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert rooms <= set(LEVELS), f"give {rooms - set(LEVELS)} a level here and in docs/architecture.md"


def test_the_levels_stand_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [[cell.strip().strip("`") for cell in line.split("|")] for line in text.splitlines() if "|" in line]
    shown = {row[2].removesuffix("/").removesuffix(".py"): row[1] for row in rows if row[1].isdigit()}
    assert shown == {room: str(level) for room, level in LEVELS.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    upward = [
        f"{path.name}:{line} imports {name}"
        for line, name in imported(path)
        if room(name) != own and LEVELS[room(name)] >= LEVELS[own]
    ]
    assert not upward, upward


def test_files_and_functions_stay_small() -> None:
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    assert not {name: n for name, n in lengths.items() if n > 400}
    long_functions = [
        f"{p.name}:{node.name}"
        for p in FILES
        for node in ast.walk(ast.parse(p.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.body[0].lineno >= 45
    ]
    assert not long_functions, "aim for functions under 40 lines; a body of 45, docstring included, is the end"


@pytest.mark.parametrize(
    ("folder", "forbidden"), [("tests", "scripts"), ("scripts", "tests"), ("exl2jax", "tests"), ("exl2jax", "scripts")]
)
def test_tests_and_scripts_do_not_import_each_other(folder: str, forbidden: str) -> None:
    """Helpers of both are in exl2jax.testing; the tests of the scripts are in scripts/tests."""
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imported(path, forbidden)
    ]
    assert not found, found
