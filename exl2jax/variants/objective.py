"""Objectives of the row-wise allocation: what a module's error counts for in the sum that is minimised."""

from dataclasses import dataclass

import numpy as np

from exl2jax.variants.registry import variant


@dataclass(frozen=True, kw_only=True, slots=True)
class NormSettings:
    """The exponent of the error."""

    norm: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what would reward errors."""
        if not self.norm > 0:
            raise ValueError("norm must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class FloorSettings:
    """Errors below `floor` count as `floor`: the logarithm of an error of nothing is no reason to spend a bit."""

    floor: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse what has no logarithm."""
        if not self.floor > 0:
            raise ValueError("floor must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class MinimaxSettings:
    """How sharply the largest error rules: at `norm` 32 an error 10 % smaller counts a thirtieth."""

    norm: float = 32.0


@variant("objective", "stock", NormSettings)
def stock(errors: np.ndarray, settings: NormSettings) -> np.ndarray:
    """`sum error^norm`, the sum of errors by default (docs/format.md 4; stock picks norms of 1.5 to 3.5)."""
    return errors**settings.norm


@variant("objective", "squared", NormSettings)
def squared(errors: np.ndarray, settings: NormSettings) -> np.ndarray:
    """Squared errors: relative energy rather than relative length, to the power `norm`."""
    return np.square(errors) ** settings.norm


@variant("objective", "logs", FloorSettings)
def logs(errors: np.ndarray, settings: FloorSettings) -> np.ndarray:
    """`sum log error`, the product of errors: a module counts by how many times its error shrinks."""
    return np.log(np.maximum(errors, settings.floor) / settings.floor)


@variant("objective", "minimax", MinimaxSettings)
def minimax(errors: np.ndarray, settings: MinimaxSettings) -> np.ndarray:
    """The largest error as small as can be, by a high norm, which settles the next largest too."""
    return np.maximum(errors, 1e-9) ** settings.norm
