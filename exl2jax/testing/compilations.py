"""Counting the programs that XLA compiles."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's name of the event."""


@contextmanager
def compilations() -> Iterator[list[float]]:
    """Seconds of each of XLA's compilations meanwhile, in all threads, those answered by a cache on disk included."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
