"""The losses of the scale searches, one thread per column: `ops.scale_losses.scale_losses` as a kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from exl2jax.ops.scale_losses import raised
from exl2jax.pallas.launch import launch, shape
from exl2jax.pallas.tiles import LANES, Tiles, pad_columns


def scale_losses(
    x: jax.Array, scales: jax.Array, codes: jax.Array, importance: jax.Array | None = None, *, tiles: Tiles
) -> jax.Array:
    """Loss of every column of `x [rows, N]` at every scale, `[S, N]`, as `ops.scale_losses.scale_losses`.

    `codes`, the number of levels, may be one for each column here, `[N]`.
    """
    rows, columns = x.shape
    count = len(scales)
    chunks = -(-count // tiles.scales)
    codes = jnp.broadcast_to(codes.astype(jnp.float32), (columns,))
    x, low, high = (pad_columns(v) for v in (x, -codes / 2, codes / 2 - 1))
    scales = jnp.broadcast_to(scales, (count, columns))
    extra = ((0, chunks * tiles.scales - count), (0, x.shape[1] - columns))
    scales = jnp.pad(scales, extra, constant_values=1)
    run = launch(
        partial(_body, rows=rows, count=tiles.scales),
        shape(scales.shape, jnp.float32),
        {"columns": x.shape[1] // LANES, "chunks": chunks},
        tiles,
    )
    weights = () if importance is None else (importance,)
    return run(x, scales, low, high, *weights)[:count, :columns]


def _body(weights: Any, scales: Any, lows: Any, highs: Any, *rest: Any, rows: int, count: int) -> None:
    """One program: `LANES` columns, whose rows stay in registers, at `count` scales."""
    *importance, losses = rest
    columns = pl.ds(lax.axis_index("columns") * LANES, LANES)
    low, high = lows[columns], highs[columns]
    x = [weights[r, columns] for r in range(rows)]
    own = [importance[0][r] if importance else None for r in range(rows)]
    first = lax.axis_index("chunks") * count

    def scale(i: jax.Array, carry: None) -> None:
        s = scales[first + i, columns]
        inverse = 1 / s
        total = jnp.zeros((LANES,), jnp.float32)
        for value, weight in zip(x, own, strict=True):
            z = jnp.abs(jnp.clip(jnp.round(value * inverse), low, high) * s - value)
            total = total + raised(z, weight)
        losses[first + i, columns] = total
        return carry

    lax.fori_loop(0, count, scale, None)
