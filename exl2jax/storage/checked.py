"""Tensor files that carry a checksum over their content, so that a torn or altered one is never taken for whole."""

import hashlib
import json
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors then returns)
import numpy as np
from safetensors import SafetensorError, safe_open

from exl2jax.errors import StorageError
from exl2jax.storage.atomic import write_tensors
from exl2jax.storage.headers import check_header
from exl2jax.types import Tensors

CHECKSUM = "sha256"
METADATA = "exl2jax"
"""The one key of the file's own metadata, a JSON object: safetensors writes several in an order that changes."""


def write_checked_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, its metadata holding a SHA-256 over names, dtypes, shapes and bytes."""
    ordered = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    metadata = metadata or {}
    full = metadata | {CHECKSUM: _digest(ordered, metadata)}
    write_tensors(path, ordered, {METADATA: json.dumps(full, sort_keys=True)})


def read_checked_tensors(path: Path, *, again: bool = False) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of such a file; `StorageError` when it is unreadable or its checksum does not fit.

    `again` leaves the checksum out: this process read the file before and found it whole.
    """
    try:
        check_header(path)
        with safe_open(path, framework="numpy") as handle:
            metadata = json.loads((handle.metadata() or {})[METADATA])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, KeyError, ValueError, TypeError, RecursionError, SafetensorError) as e:
        raise StorageError(f"{path}: the file is damaged ({e})") from e
    checksum = metadata.pop(CHECKSUM, None) if isinstance(metadata, dict) else None
    if checksum is None or not (again or checksum == _digest(tensors, metadata)):
        raise StorageError(f"{path}: the file is damaged (its checksum does not fit its content)")
    return tensors, metadata


def _digest(tensors: Tensors, metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        digest.update(np.frombuffer(tensor, np.uint8).data if tensor.size else b"")
    return digest.hexdigest()
