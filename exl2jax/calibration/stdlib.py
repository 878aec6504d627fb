"""More code and technical text, read at run time from the Python standard library in a fixed order."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_CODE_MODULES = (
    "heapq", "textwrap", "fractions", "bisect", "shlex", "graphlib", "csv", "configparser", "difflib", "calendar",
    "functools", "contextlib", "queue", "sched", "string", "tempfile", "dataclasses", "colorsys", "html/parser",
    "json/decoder", "json/encoder", "urllib/parse", "concurrent/futures/thread", "asyncio/queues", "asyncio/locks",
    "logging/handlers", "xml/etree/ElementTree", "email/message", "http/client", "zipfile/__init__", "argparse",
    "collections/__init__", "enum", "ipaddress", "mailbox", "optparse", "pathlib", "selectors", "shutil",
    "socketserver", "ssl", "subprocess", "tarfile", "threading", "tokenize", "traceback", "types", "uuid",
    "weakref", "wave",
)  # fmt: skip
_TECHNICAL_MODULES = (
    "statistics", "_pydecimal", "random", "fractions", "heapq", "difflib", "datetime", "_pydatetime", "ipaddress",
    "struct", "pickletools", "numbers", "colorsys", "hashlib", "hmac", "secrets", "decimal", "functools", "itertools",
    "threading", "multiprocessing/managers", "asyncio/tasks", "asyncio/events", "argparse", "logging/__init__",
    "unittest/case", "doctest", "typing", "inspect", "ssl", "socket", "zipfile/__init__", "tarfile", "gettext",
)  # fmt: skip


def code_fillers() -> Iterator[str]:
    """Source texts of modules, one after the other; modules this Python lacks are left out."""
    for path in _paths(_CODE_MODULES):
        yield path.read_text(encoding="utf-8")


def technical_fillers() -> Iterator[str]:
    """The documentation texts of modules: each module's docstrings in the order of its source, a blank line apart."""
    for path in _paths(_TECHNICAL_MODULES):
        texts = _docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if texts:
            yield "\n\n".join(texts) + "\n\n"


def _paths(modules: tuple[str, ...]) -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for module in modules:
        path = root / f"{module}.py"
        if path.is_file():
            yield path


def _docstrings(node: ast.AST) -> list[str]:
    """Docstrings of a module, its classes and functions, depth first."""
    own = []
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        own = [text] if text else []
    return own + [text for child in ast.iter_child_nodes(node) for text in _docstrings(child)]
