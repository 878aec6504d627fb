"""States of a few rows as the passes take them, for tests and benchmarks."""

import numpy as np

from exl2jax.stream.streams import Rows, Stream


def rows_of(states: np.ndarray, mask: np.ndarray | None = None, *, single: bool = False, resident: bool = True) -> Rows:
    """The rows of `states [R, T, D]`; all tokens count where there is no `mask [R, T]`."""
    counted = np.ones(states.shape[:2], np.float32) if mask is None else mask
    return Rows.of(counted, states.shape[-1], single=single, resident=resident)


def stream_of(states: np.ndarray, *, resident: bool = True) -> Stream:
    """The stream of `states [R, T, D]`, which stay as they are."""
    return rows_of(states, resident=resident).place(states.copy())
