"""Counting the times that the host waits for an array of the device."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

WAITING = ("__bool__", "__float__", "__int__", "__index__")
"""Methods of an array that read it."""


@contextmanager
def reads() -> Iterator[list[str]]:
    """The reads of arrays on the device meanwhile, each by the name of its thread."""
    seen: list[str] = []
    real, together, kind = np.asarray, jax.device_get, type(jnp.zeros(()))

    def asarray(value: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        if isinstance(value, kind):
            seen.append(threading.current_thread().name)
        return real(value, *args, **kwargs)

    def counted(method: Any) -> Any:
        def read(self: jax.Array) -> Any:
            seen.append(threading.current_thread().name)
            return method(self)

        return read

    def device_get(tree: Any) -> Any:
        seen.append(threading.current_thread().name)  # its arrays come side by side: one wait
        return together(tree)

    with patch.object(np, "asarray", asarray), patch.object(jax, "device_get", device_get):
        originals = {name: getattr(kind, name) for name in WAITING}
        try:
            for name, method in originals.items():
                setattr(kind, name, counted(method))
            yield seen
        finally:
            for name, method in originals.items():
                setattr(kind, name, method)
