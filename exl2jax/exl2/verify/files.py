"""The weight files of an EXL2 directory, opened one by one so that a damaged file hides none of the others."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exl2jax.errors import ModelError
from exl2jax.exl2.verify.report import Fault
from exl2jax.ops.packing import TENSOR_NAMES
from exl2jax.storage import TensorFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """The readable weight files of a directory: `contents` maps a file name to its tensors, `where` a tensor to its
    file, `bytes` is the size of all weight files, readable or not.
    """  # noqa: D205

    contents: Mapping[str, tuple[str, ...]]
    where: Mapping[str, TensorFiles]
    bytes: int

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def dtype(self, name: str) -> str:
        """Stored dtype, as safetensors spells it."""
        return self.where[name].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, from the header."""
        return self.where[name].shape(name)

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored dtype."""
        return self.where[name].read(name)

    def quantized_keys(self) -> tuple[str, ...]:
        """Keys of the linears that at least one of the five tensors is stored for, in order of first sight."""
        split = (name.rpartition(".") for name in self.where)
        return tuple(dict.fromkeys(key for key, _, last in split if key and last in TENSOR_NAMES))


def open_shards(directory: Path) -> tuple[Shards, list[Fault]]:
    """Read the headers of all `*.safetensors` files, which the loader reads too, and collect their faults.

    A tensor that two files hold is a fault; the first file's is the one checked further.
    """
    contents: dict[str, tuple[str, ...]] = {}
    where: dict[str, TensorFiles] = {}
    faults, size = [], 0
    for path in sorted(directory.glob("*.safetensors")):
        try:
            size += path.stat().st_size
            tensors = TensorFiles([path])
        except (ModelError, OSError) as e:
            faults.append(Fault(tensor=path.name, message=f"cannot be read: {e}"))
            continue
        contents[path.name] = tuple(tensors)
        for name in tensors:
            if name in where:
                first = where[name].file(name).name
                faults.append(Fault(tensor=name, message=f"stands in two files, {first} and {path.name}; remove one"))
            else:
                where[name] = tensors
    if not contents and not faults:
        faults.append(Fault(tensor=str(directory), message="holds no *.safetensors files"))
    return Shards(contents=contents, where=where, bytes=size), faults


def leftover_faults(shards: Shards, source_weights: frozenset[str]) -> list[Fault]:
    """One fault per file that holds unquantized weights of linears and nothing of a quantized one: a source shard."""
    faults = []
    for file, names in shards.contents.items():
        found = [name for name in names if name in source_weights]
        if found and not any(name.endswith(TENSOR_NAMES) for name in names):
            message = (
                f"is a left-over source shard with {len(found)} unquantized weights; the loader reads it: delete it"
            )
            faults.append(Fault(tensor=file, message=message))
    return faults
