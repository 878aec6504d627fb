"""Measures of a module's error, row by row, for bits that are spent against stock's accuracies."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from exl2jax.ops import relative_frobenius
from exl2jax.variants.registry import NoSettings, variant

type RowError = Callable[[jax.Array, jax.Array], jax.Array]
"""`error(out [R, T, D], ref [R, T, D]) -> [R]`, a function of a module so that it is compiled once."""


@variant("error", "stock")
def frobenius(settings: NoSettings) -> RowError:
    """`||out - ref|| / ||ref||` of a module's output, stock's measure (docs/format.md 2.7)."""
    return relative_frobenius


@variant("error", "squared")
def squared(settings: NoSettings) -> RowError:
    """`||out - ref||^2 / ||ref||^2`, the share of a row's energy that is lost."""
    return squared_frobenius


def squared_frobenius(out: jax.Array, ref: jax.Array) -> jax.Array:
    """The square of `relative_frobenius`: `[..., T, D] -> [...]`."""
    return jnp.square(relative_frobenius(out, ref))
