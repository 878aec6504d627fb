"""Lazy reading of tensors from one or many safetensors files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # registers bfloat16 with NumPy, which safetensors then returns
import numpy as np
from safetensors import SafetensorError, safe_open

from exl2jax.errors import ModelError
from exl2jax.storage.atomic import read_json
from exl2jax.storage.headers import check_header, stored_bytes

LONGEST_NAME = 255
"""Bytes of a file's name that file systems take."""

INDEX_NAME = "model.safetensors.index.json"

FLOAT8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
"""Dtypes that safetensors looks for in NumPy itself, where they are not."""


class TensorFiles:
    """The tensors of a directory by name; only headers are read until a tensor is asked for."""

    def __init__(self, files: list[Path]) -> None:
        """Read the headers of `files`; `ModelError` names a damaged file or a tensor that two files hold."""
        self.files = tuple(files)
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
        """The weights of a Hugging Face directory: the files its index names, or else every safetensors file."""
        index = directory / INDEX_NAME
        if index.exists():
            return cls(_indexed_files(index))
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            pickled = sorted(p.name for p in directory.glob("*.bin"))
            advice = f" (it has {pickled[0]}: convert the model to safetensors first)" if pickled else ""
            raise ModelError(f"{directory}: no *.safetensors weights found{advice}")
        return cls(files)

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


def _is_plain_name(name: str) -> bool:
    """Whether a name stays in its directory, whatever the file system makes of it."""
    plain = name == Path(name).name and name not in ("", "..") and name.isprintable()
    return plain and len(name.encode()) <= LONGEST_NAME


def _indexed_files(index: Path) -> list[Path]:
    """Files that an index names, which must lie in its own directory."""
    record = read_json(index, ModelError, "the weight index")
    weight_map = record.get("weight_map") if isinstance(record, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(n, str) and _is_plain_name(n) for n in names):
        raise ModelError(f"{index}: weight_map must map tensors to files of the same directory")
    missing = sorted(n for n in set(names) if not (index.parent / n).exists())
    if missing:
        raise ModelError(f"{index.parent / missing[0]}: named by {index.name} but missing; download it again")
    return [index.parent / n for n in sorted(set(names))]
