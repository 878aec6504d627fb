"""The header of a safetensors file, checked against the file before anything is allocated for it."""

import json
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


def stored_bytes(path: Path, name: str) -> bytes:
    """The bytes of a tensor in a file that the library has opened before, and whose header it has checked by that."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        start, stop = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        return file.read(stop - start)
