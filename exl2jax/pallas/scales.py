"""The losses of the scale search, one thread per column: `ops.scales.grid_losses` as a kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from exl2jax.ops.scales import GRID
from exl2jax.pallas.launch import launch, shape
from exl2jax.pallas.tiles import LANES, Tiles, pad_columns


def grid_losses(steps: jax.Array, column_weight: jax.Array, codes: jax.Array, *, tiles: Tiles) -> jax.Array:
    """Loss of every multiplier `[97]` for `steps [rows, N]` at `codes` levels, as `ops.scales.grid_losses`."""
    return column_losses(steps, codes, tiles=tiles) @ column_weight


def column_losses(steps: jax.Array, codes: jax.Array, *, tiles: Tiles) -> jax.Array:
    """Loss of every multiplier in every column, `[97, N]`: the kernel sums over the rows of the group.

    The sum over columns is left to the caller, so that matrices side by side can be summed apart. `codes` is the
    number of levels, one or one for each column `[N]`.
    """
    rows, columns = steps.shape
    codes = jnp.broadcast_to(codes.astype(jnp.float32), (columns,))
    x, low, high = (pad_columns(v) for v in (steps, -codes / 2, codes / 2 - 1))
    chunks = -(-len(GRID) // tiles.grid_points)
    points = np.pad(GRID, (0, chunks * tiles.grid_points - len(GRID)), constant_values=1)
    run = launch(
        partial(_body, rows=rows, points=tiles.grid_points),
        shape((len(points), x.shape[1]), jnp.float32),
        {"columns": x.shape[1] // LANES, "chunks": chunks},
        tiles,
    )
    return run(x, jnp.asarray(points), low, high)[: len(GRID), :columns]


def _body(steps: Any, grid: Any, lows: Any, highs: Any, losses: Any, *, rows: int, points: int) -> None:
    """One program: `LANES` columns, whose rows stay in registers, at `points` multipliers."""
    columns = pl.ds(lax.axis_index("columns") * LANES, LANES)
    low, high = lows[columns], highs[columns]
    x = [steps[r, columns] for r in range(rows)]
    first = lax.axis_index("chunks") * points

    def point(i: jax.Array, carry: None) -> None:
        p = grid[first + i]
        inverse = 1 / p
        total = jnp.zeros((LANES,), jnp.float32)
        for value in x:
            z = jnp.abs(jnp.clip(jnp.round(value * inverse), low, high) * p - value)
            total = total + z * z * z * jnp.sqrt(z)
        losses[first + i, columns] = total
        return carry

    lax.fori_loop(0, points, point, None)
