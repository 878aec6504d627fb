"""Writing many tensors into shards of bounded size, all visible at once or not at all."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from exl2jax.errors import StorageError
from exl2jax.storage.atomic import TEMPORARY_SUFFIX, remove, rename, storing, sync, write_tensors
from exl2jax.storage.headers import TensorHead, file_size

MEGABYTE = 1024 * 1024
METADATA = {"format": "pt"}
_PENDING = "output_temp_{:05}.safetensors.part"
_OURS = re.compile(r"output(-\d{5}-of-\d{5})?\.safetensors|output_temp_\d{5}\.safetensors\.part")
"""Names that a conversion gives; a killed one leaves them with the temporary suffix too."""


def is_shard(name: str) -> bool:
    """Whether a file name is one that `ShardWriter` gives, and clears before it writes again."""
    return _OURS.fullmatch(name) is not None


def shards_size(tensors: Iterable[TensorHead], shard_mb: float) -> int:
    """Bytes of all the shards that a `ShardWriter` makes of these tensors, headers included."""
    shards: list[list[TensorHead]] = [[]]
    held, limit = 0, _limit(shard_mb)
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return sum(file_size(shard, METADATA) for shard in shards)


def _limit(shard_mb: float) -> float:
    return shard_mb * MEGABYTE if shard_mb > 0 else float("inf")


class ShardWriter:
    """Collects tensors and writes `output.safetensors`, or `output-00001-of-0000N.safetensors` when they outgrow one.

    Shards are written under names that no loader globs; `finish` renames them all.
    """

    def __init__(self, directory: Path, shard_mb: float) -> None:
        """Write into `directory`, at most `shard_mb` MiB a shard (0: one file); clears what an earlier try left."""
        self._directory = directory
        self._limit = _limit(shard_mb)
        self._waiting: dict[str, np.ndarray] = {}
        self._bytes = 0
        self._shards = 0
        with storing(directory, "cannot list"):
            entries = sorted(directory.iterdir())
        for path in entries:
            if is_shard(path.name.removesuffix(TEMPORARY_SUFFIX)):
                remove(path)

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Take a tensor; full shards are written as they fill. `StorageError` names a tensor larger than a shard."""
        if self._waiting and self._bytes + tensor.nbytes > self._limit:
            self._flush()
        if tensor.nbytes > self._limit:
            raise StorageError(
                f"{name}: {tensor.nbytes / MEGABYTE:.0f} MB do not fit a shard; raise `shard_size` or set it to 0"
            )
        self._waiting[name] = np.ascontiguousarray(tensor)
        self._bytes += tensor.nbytes

    def finish(self) -> tuple[Path, ...]:
        """Write the last shard and give all their final names."""
        if self._waiting:
            self._flush()
        names = (
            ["output.safetensors"]
            if self._shards == 1
            else [f"output-{i + 1:05}-of-{self._shards:05}.safetensors" for i in range(self._shards)]
        )
        for i, name in enumerate(names):
            rename(self._directory / _PENDING.format(i + 1), self._directory / name)
        sync(self._directory)
        return tuple(self._directory / name for name in names)

    def _flush(self) -> None:
        self._shards += 1
        write_tensors(self._directory / _PENDING.format(self._shards), self._waiting, METADATA)
        self._waiting, self._bytes = {}, 0
