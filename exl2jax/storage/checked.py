"""Tensor files that carry a checksum over their content, so that a torn or altered one is never taken for whole."""

import hashlib
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then returns)
import numpy as np
from safetensors import SafetensorError, safe_open

from exl2jax.errors import StorageError
from exl2jax.storage.atomic import write_tensors
from exl2jax.storage.headers import check_header
from exl2jax.types import Tensors

CHECKSUM = "sha256"


def write_checked_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, its metadata holding a SHA-256 over names, dtypes, shapes and bytes."""
    ordered = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    metadata = metadata or {}
    write_tensors(path, ordered, metadata | {CHECKSUM: _digest(ordered, metadata)})


def read_checked_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of such a file; `StorageError` when it is unreadable or its checksum does not fit."""
    try:
        check_header(path)
        with safe_open(path, framework="numpy") as handle:
            metadata = dict(handle.metadata() or {})
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, ValueError, TypeError, SafetensorError) as e:
        raise StorageError(f"{path}: the file is damaged ({e})") from e
    if metadata.pop(CHECKSUM, None) != _digest(tensors, metadata):
        raise StorageError(f"{path}: the file is damaged (its checksum does not fit its content)")
    return tensors, metadata


def _digest(tensors: Tensors, metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        digest.update(tensor.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
