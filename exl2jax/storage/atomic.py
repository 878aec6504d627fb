"""Commit by rename: a reader sees the old file or the new one, never half of one.

Everything the package changes on disk goes through the functions here, and every refusal of the system becomes a
`StorageError` that names the file.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from exl2jax.errors import StorageError
from exl2jax.storage.bounded_json import parse_json
from exl2jax.types import Tensors

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def storing(path: Path, what: str = "cannot write") -> Iterator[None]:
    """Turn a refusal of the system (full, read-only, no permission, broken) into a `StorageError` naming `path`."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise StorageError(
            f"{path}: {what} ({e}); free some space or fix the permissions, then run again; nothing is half-written"
        ) from e


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, rename it into place, and sync the directory.

    Raises `StorageError` naming the file when the system refuses; the temporary file is removed and whatever stood at
    `path` before is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with storing(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # what the user's umask gives; safetensors makes files for their owner alone
            _fsync(temporary)
            temporary.replace(path)
            _fsync(path.parent)
        except Exception:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; the same tensors give the same bytes."""
    # safetensors writes memory as it lies: a transposed view would come back scrambled.
    ordered = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: _save(temporary, ordered, metadata))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON atomically."""
    text = json.dumps(value, indent=4, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(path, write)


def copy_file(source: Path, path: Path) -> None:
    """Copy the content of a file atomically."""
    write_atomically(path, lambda temporary: _copy(source, temporary))


def read_json(path: Path, error: type[Exception], what: str) -> Any:
    """Parse a JSON file within the bounds of `bounded_json`; any failure becomes `error` naming the file and `what`."""
    try:
        return parse_json(path)
    except FileNotFoundError as e:
        raise error(f"{path}: {what} is missing") from e
    except (OSError, RecursionError, ValueError) as e:
        raise error(f"{path}: {what} cannot be read ({e})") from e


def make_directory(path: Path, what: str) -> None:
    """Create a directory and prove that it can be written, or raise `StorageError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".exl2jax-probe{TEMPORARY_SUFFIX}"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise StorageError(
            f"{path}: {what} is not a writable directory ({e}); choose another or fix its permissions"
        ) from e


def reserve(path: Path, size: int) -> bool:
    """Make sure of a file of `size` bytes with all its space on disk; True where it had to be made, full of zeros.

    A mapped file whose blocks are not there yet kills the process that touches them on a full disk.
    """
    with storing(path):
        if path.exists() and path.stat().st_size == size:
            return False
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        return True


def rename(path: Path, target: Path) -> None:
    """Give a finished file its final name; `sync` the directory when all have theirs."""
    with storing(target):
        path.replace(target)


def remove(path: Path) -> None:
    """Remove a file or a whole directory; nothing happens where there is none."""
    with storing(path, "cannot remove"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Remove the temporary files that a killed run left in a directory of ours."""
    if directory.is_dir():
        for path in sorted(directory.glob("*" + TEMPORARY_SUFFIX)):
            remove(path)


def sync(directory: Path) -> None:
    """Bring the names in a directory to the disk itself."""
    with storing(directory, "cannot sync"):
        _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save(path: Path, tensors: Tensors, metadata: dict[str, str] | None) -> None:
    """Write a safetensors file; the library puts several metadata in an order that changes, so they are sorted."""
    save_file(dict(tensors), path, metadata=metadata)
    if metadata and len(metadata) > 1:
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
            if len(text) == length:
                file.seek(8)
                file.write(text)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)
