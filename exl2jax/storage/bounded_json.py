"""JSON from strangers: bounded in size and depth, no NaN, no text that cannot be written back."""

import json
import sys
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20
"""Largest JSON file that is read: more than the index or the measurement of the largest models. Parsed, the worst
content takes 25 times as much memory."""

MAX_DEPTH = 64
"""Deepest nesting: the files that are read have less than ten levels."""


LARGEST = sys.float_info.max
"""Numbers must be less: JSON knows integers of any length, which no float holds."""


def parse_json(path: Path) -> Any:
    """The value in a JSON file; `ValueError` says which bound it breaks, `OSError` comes from the system."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes, more than the {MAX_BYTES} that are read")
    value = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse)
    _check(value)
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _check(value: Any) -> None:
    """Walk a parsed value level by level, without recursion."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                item.encode("utf-8")  # a lone surrogate has no bytes: it could not be written back
            elif isinstance(item, int | float) and not -LARGEST < item < LARGEST:
                raise ValueError("a number is beyond double precision")
        level, depth = below, depth + 1
