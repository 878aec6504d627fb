"""The header of a safetensors file, checked against the file before anything is allocated for it."""

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

MAX_HEADER = 32 * 2**20
"""Largest header that is read: a hundred thousand tensors in one file need half of it."""

POINTER = b"version https://git-lfs"
"""The beginning of a small text file that stands in a clone for a large file which was not downloaded."""

_DTYPES = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16"),
    *("I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)
"""The library writes tensors by dtype, the last of these first, and by name within one."""


class TensorHead(NamedTuple):
    """The header entry of a tensor: name, dtype as safetensors spells it, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data: F16, BF16, F32, F8_E4M3 and the like carry their bits in their names."""
        digits = "".join(c for c in self.dtype.partition("_")[0] if c.isdigit())
        return math.prod(self.shape) * int(digits or 8) // 8


def file_size(tensors: Sequence[TensorHead], metadata: dict[str, str]) -> int:
    """Bytes of the safetensors file that these tensors and this metadata will make."""
    header: dict[str, object] = {"__metadata__": metadata}
    stop = 0
    for t in sorted(tensors, key=lambda t: (-_DTYPES.index(t.dtype), t.name)):
        start, stop = stop, stop + t.nbytes
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [start, stop]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + stop


def check_header(path: Path) -> None:
    """Raise `ValueError` unless the file holds the header it announces; the library checks what the header says."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is no file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise ValueError("it is a Git LFS pointer, not the weights: run `git lfs pull` in the model's directory")
    start = start[:8]
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
