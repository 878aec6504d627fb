"""Lazy reading of tensors from one or many safetensors files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # registers bfloat16 with NumPy, which safetensors then returns
import numpy as np
from safetensors import SafetensorError, safe_open

from exl2jax.errors import ModelError
from exl2jax.storage.headers import check_header, stored_bytes
from exl2jax.storage.source_files import weight_files

FLOAT8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
"""Dtypes that safetensors looks for in NumPy itself, where they are not."""


class TensorFiles:
    """The tensors of a directory by name; only headers are read until a tensor is asked for."""

    def __init__(self, files: Sequence[Path], notes: Sequence[str] = ()) -> None:
        """Read the headers of `files`; `ModelError` names a damaged file or a tensor that two files hold.

        `notes` say what a person should know about the choice of these files.
        """
        self.files, self.notes = tuple(files), tuple(notes)
        self._where: dict[str, Path] = {}
        self._headers: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in files:
            with _opened(path) as handle:
                for name in handle.keys():  # noqa: SIM118  (not a mapping)
                    if name in self._where:
                        raise ModelError(f"{path}: tensor {name} also stands in {self._where[name].name}; remove one")
                    piece = handle.get_slice(name)
                    self._where[name] = path
                    self._headers[name] = (piece.get_dtype(), tuple(piece.get_shape()))

    @classmethod
    def of_source(cls, directory: Path) -> "TensorFiles":
        """The weights of a Hugging Face directory; `weight_files` says which files hold them."""
        found = weight_files(directory)
        return cls(found.files, found.notes)

    @classmethod
    def of_exl2(cls, directory: Path) -> "TensorFiles":
        """Every safetensors file of an EXL2 directory, as its loader globs them."""
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{directory}: no *.safetensors files found")
        return cls(files)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._header(name)[1]

    def dtype(self, name: str) -> str:
        """Stored dtype as safetensors spells it (`F16`, `BF16`, `I32`, ...)."""
        return self._header(name)[0]

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        self._header(name)
        return self._where[name]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor in its stored dtype; with `rows` only those are read."""
        path = self.file(name)
        with _opened(path) as handle:
            stored, shape = self._header(name)
            if stored in FLOAT8:
                whole = np.frombuffer(stored_bytes(path, name), FLOAT8[stored]).reshape(shape)
                return whole if rows is None else whole[rows]
            return handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows]

    def _header(self, name: str) -> tuple[str, tuple[int, ...]]:
        if name not in self._headers:
            raise ModelError(f"{self.files[0].parent}: tensor {name} is missing from the weights")
        return self._headers[name]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        check_header(path)
        with safe_open(path, framework="numpy") as handle:
            yield handle
    except (OSError, SafetensorError, ValueError, TypeError) as e:
        raise ModelError(f"{path}: not a readable safetensors file ({e}); download it again") from e
