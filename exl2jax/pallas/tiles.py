"""Tile choices of the kernels, as frozen values, and the padding of columns to whole tiles."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

LANES = 128
"""Columns of a program: a warpgroup's threads, a column each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How the kernels cut their work: `walk_rows` rows held in registers by the walk (a divisor of 32), and at most
    `scales` tried by one program of a scale search. Both are unrolled, which is what takes tracing and compiling long.
    Interpreted or compiled by `interpret`.
    """  # noqa: D205

    walk_rows: int = 8
    scales: int = 14
    interpret: bool = False


def pad_columns(x: jax.Array) -> jax.Array:
    """`x [..., N]` with zero columns up to a multiple of `LANES`."""
    extra = -x.shape[-1] % LANES
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)]) if extra else x
