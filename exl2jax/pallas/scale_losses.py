"""The losses of the scale searches, one thread per column: `ops.scale_losses.scale_losses` as a kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from exl2jax.ops.scale_losses import raised
from exl2jax.pallas.launch import launch, shape, zeros
from exl2jax.pallas.tiles import LANES, Tiles, pad_columns


def scale_losses(
    x: jax.Array,
    scales: jax.Array,
    codes: jax.Array,
    importance: jax.Array | None = None,
    rows: jax.Array | None = None,
    *,
    tiles: Tiles,
) -> jax.Array:
    """Loss of every column of `x [size, N]` at every scale, `[S, N]`, as `ops.scale_losses.scale_losses`."""
    size, columns = x.shape
    chunks = -(-len(scales) // tiles.scales)
    count = -(-len(scales) // chunks)
    codes = jnp.broadcast_to(codes.astype(jnp.float32), (columns,))
    x, low, high = (pad_columns(v) for v in (x, -codes / 2, codes / 2 - 1))
    padded = jnp.broadcast_to(scales, (len(scales), columns))
    extra = ((0, chunks * count - len(scales)), (0, x.shape[1] - columns))
    padded = jnp.pad(padded, extra, constant_values=1)
    run = launch(
        partial(_body, size=size, count=count, weighted=importance is not None, tiles=tiles),
        shape(padded.shape, jnp.float32),
        {"columns": x.shape[1] // LANES, "chunks": chunks},
        tiles,
    )
    more = () if importance is None else (importance,)
    more = more if rows is None else (*more, rows.astype(jnp.int32).reshape(1))
    return run(x, padded, low, high, *more)[: len(scales), :columns]


def _body(
    weights: Any, scales: Any, lows: Any, highs: Any, *rest: Any, size: int, count: int, weighted: bool, tiles: Tiles
) -> None:
    """One program: `LANES` columns at `count` scales, whose losses grow in registers row by row."""
    *more, losses = rest
    importance = more[:1] if weighted else []
    rows = more[-1][0] if len(more) > weighted else size
    columns = pl.ds(lax.axis_index("columns") * LANES, LANES)
    low, high = lows[columns], highs[columns]
    first = lax.axis_index("chunks") * count
    tried = [scales[first + i, columns] for i in range(count)]
    inverses = [1 / s for s in tried]

    def row(r: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        value = weights[r, columns]
        weight = importance[0][r] if importance else None
        errors = (
            jnp.abs(jnp.clip(jnp.round(value * inverse), low, high) * s - value)
            for s, inverse in zip(tried, inverses, strict=True)
        )
        return tuple(total + raised(z, weight) for total, z in zip(totals, errors, strict=True))

    totals = lax.fori_loop(0, rows, row, (zeros(jnp.float32, tiles),) * count)
    for i, total in enumerate(totals):
        losses[first + i, columns] = total
