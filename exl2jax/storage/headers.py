"""The header of a safetensors file, checked against the file before anything is allocated for it."""

import struct
from pathlib import Path

MAX_HEADER = 32 * 2**20
"""Largest header that is read: a hundred thousand tensors in one file need half of it."""


def check_header(path: Path) -> None:
    """Raise `ValueError` unless the file holds the header it announces; the library checks what the header says."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is no file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) < 8:
        raise ValueError(f"{size} bytes are too few")
    (length,) = struct.unpack("<Q", start)
    if length > size - 8:
        raise ValueError(f"a header of {length} bytes is announced, the file has {size}")
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes is more than the {MAX_HEADER} that are read")
