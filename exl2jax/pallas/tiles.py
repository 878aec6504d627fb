"""Tile choices of the kernels, as frozen values, and the padding of columns to whole tiles."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

LANES = 128
"""Columns of a program: a warpgroup's threads, a column each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How the kernels cut their work.

    The walk holds `walk_rows` rows in registers (a divisor of 32) and takes up the errors of `taken_up` rows (a divisor
    of those) in a step. A scale search tries at most `scales` in a program, and loads a row while it works on the one
    `ahead` rows before. All but the last are unrolled, which is what takes tracing and compiling long. Loads that do
    not wait for each other are what makes a step short: one from memory takes as long as hundreds of operations.
    `interpret` instead of compiling.
    """

    walk_rows: int = 8
    taken_up: int = 8
    scales: int = 14
    ahead: int = 4
    interpret: bool = False


def pad_columns(x: jax.Array) -> jax.Array:
    """`x [..., N]` with zero columns up to a multiple of `LANES`."""
    extra = -x.shape[-1] % LANES
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)]) if extra else x
