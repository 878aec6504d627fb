"""Commit by rename: a reader sees the old file or the new one, never half of one."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from exl2jax.errors import StorageError
from exl2jax.types import Tensors

TEMPORARY_SUFFIX = ".tmp"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, and rename it into place.

    Raises `StorageError` naming the file when the system refuses (full, read-only, no permission); the temporary file
    is removed and whatever stood at `path` before is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except Exception as e:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) or type(e).__name__ == "SafetensorError":
            raise StorageError(
                f"{path}: cannot write ({e}); free some space or fix the permissions, then run again"
            ) from e
        raise


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; the same tensors give the same bytes."""
    # safetensors writes memory as it lies: a transposed view would come back scrambled.
    ordered = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(ordered, temporary, metadata=metadata))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON atomically."""
    text = json.dumps(value, indent=4, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def read_json(path: Path, error: type[Exception], what: str) -> Any:
    """Parse a JSON file; any failure becomes `error` with a message naming the file and `what` it should be."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise error(f"{path}: {what} is missing") from e
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as e:
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


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
