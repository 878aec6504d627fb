"""Tuning of a module after its linears are quantized: the values that may still move, fitted to the module's output."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from exl2jax.variants.registry import NoSettings, variant


class Tunable(NamedTuple):
    """A block to tune.

    `start` is a tree of float32 arrays, relative changes of what can be changed, all zero; `rows` are the calibration
    rows in an order drawn from the job's seed, `batch` of which make a step. `gradient(values, rows)` is that of the
    mean squared output error, `error(values, rows)` the error itself of what would be stored for `values`, in half.
    """

    start: Any
    rows: np.ndarray
    batch: int
    gradient: Callable[[Any, np.ndarray], Any]
    error: Callable[[Any, np.ndarray], float]


class Tuned(NamedTuple):
    """Values to store, None where nothing was gained; errors on held-out rows before and after; steps taken."""

    values: Any
    before: float
    after: float
    steps: int


@variant("tuning", "none")
def none(block: Tunable, settings: NoSettings) -> Tuned:
    """No tuning: the result of GPTQ stays, as in stock."""
    return Tuned(None, 0.0, 0.0, 0)
