"""Digests of files and of JSON records."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exl2jax.errors import StorageError


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able record."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a small file that a stage left or a user gave."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise StorageError(f"{path}: cannot be read ({e}); check the path") from e
