"""The losses of the scale searches, one thread per column: `ops.scale_losses.scale_losses` as a kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from exl2jax.ops.groups import TOP, Begin
from exl2jax.ops.scale_losses import MAX_INDEX, MULTIPLIERS, OFFSETS, by_column, raised, rounding_error
from exl2jax.pallas.launch import launch, shape, zeros
from exl2jax.pallas.tiles import LANES, Tiles, pad_columns

TINY = float(jnp.finfo(jnp.float32).tiny)
"""Keeps padded columns, whose largest scale is zero, from dividing by it."""


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

    def load(r: jax.Array) -> tuple[jax.Array, ...]:
        return (weights[r, columns], *(x[r] for x in importance))

    def row(operands: tuple[jax.Array, ...], totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        value, weight = operands if importance else (*operands, None)
        errors = (rounding_error(value, s, inverse, (low, high)) for s, inverse in zip(tried, inverses, strict=True))
        return tuple(total + raised(z, weight) for total, z in zip(totals, errors, strict=True))

    totals = _over_rows(load, row, (zeros(jnp.float32, tiles),) * count, rows, tiles)
    for i, total in enumerate(totals):
        losses[first + i, columns] = total


def index_losses(
    w: jax.Array,
    base: jax.Array,
    smax: jax.Array,
    codes: jax.Array,
    importance: jax.Array,
    begin: Begin = TOP,
    rows: jax.Array | None = None,
    *,
    tiles: Tiles,
) -> tuple[jax.Array, jax.Array]:
    """Least losses and their indices by multiplier and column, as `ops.scale_losses.index_losses`."""
    size, columns = w.shape
    codes = jnp.broadcast_to(codes.astype(jnp.float32), (columns,))
    whole = columns // len(smax) % LANES == 0  # then all columns of a program are of one matrix
    smax = smax if whole else by_column(smax, columns)
    operands = [pad_columns(w), pad_columns(base), smax if whole else pad_columns(smax), pad_columns(codes)]
    out = shape((len(MULTIPLIERS), operands[0].shape[1]), jnp.float32)
    run = launch(
        partial(_index_body, size=size, step=begin.step, matrix=columns // len(smax) if whole else None, tiles=tiles),
        (out, out),
        {"columns": out.shape[1] // LANES, "multipliers": len(MULTIPLIERS)},
        tiles,
    )
    scalars = (jnp.asarray(x, jnp.int32).reshape(1) for x in ((begin.steps,) if rows is None else (begin.steps, rows)))
    least, own = run(*operands, importance, jnp.asarray(MULTIPLIERS), *scalars)
    return least[:, :columns], own[:, :columns]


def _index_body(
    weights: Any,
    bases: Any,
    maxima: Any,
    levels: Any,
    importance: Any,
    multipliers: Any,
    begin: Any,
    *rest: Any,
    size: int,
    step: int,
    matrix: int | None,
    tiles: Tiles,
) -> None:
    """One program: `LANES` columns at one multiplier, every offset's loss in registers."""
    *counted, least, own = rest
    at = begin[0] * step
    first, m = lax.axis_index("columns") * LANES, lax.axis_index("multipliers")
    columns = pl.ds(first, LANES)
    smax = maxima[columns] if matrix is None else maxima[first // matrix]
    smax, codes, p = jnp.maximum(smax, TINY), levels[columns], multipliers[m]
    low, high, inverse = -codes / 2, codes / 2 - 1, 1 / smax
    holds = jnp.round(jnp.sqrt(bases[columns] / (smax * p)) * MAX_INDEX)
    indices = [jnp.clip(holds + float(offset), 1.0, float(MAX_INDEX)) for offset in OFFSETS]
    scales = [index * index * (p / MAX_INDEX**2) for index in indices]
    inverses = [1 / scale for scale in scales]

    def load(r: jax.Array) -> tuple[jax.Array, jax.Array]:
        return weights[r, columns], importance[at + r]

    def row(operands: tuple[jax.Array, jax.Array], totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        value, weight = operands[0] * inverse, operands[1]
        errors = (jnp.clip(jnp.round(value * i), low, high) * s - value for s, i in zip(scales, inverses, strict=True))
        return tuple(total + e * e * weight for total, e in zip(totals, errors, strict=True))

    nothing = (zeros(jnp.float32, tiles),) * len(indices)
    totals = _over_rows(load, row, nothing, counted[0][0] if counted else size, tiles)
    best, index = totals[0], indices[0]
    for total, other in zip(totals[1:], indices[1:], strict=True):
        better = total < best
        best, index = jnp.where(better, total, best), jnp.where(better, other, index)
    least[m, columns], own[m, columns] = best, index


def _over_rows[Row, Totals](
    load: Callable[[Any], Row], add: Callable[[Row, Totals], Totals], totals: Totals, rows: Any, tiles: Tiles
) -> Totals:
    """The totals with all rows added; a row is loaded while those `ahead` of it are worked on."""

    def step(r: jax.Array, state: tuple[tuple[Row, ...], Totals]) -> tuple[tuple[Row, ...], Totals]:
        (first, *waiting), totals = state
        return (*waiting, load(jnp.minimum(r + tiles.ahead, rows - 1))), add(first, totals)

    return lax.fori_loop(0, rows, step, (tuple(load(r) for r in range(tiles.ahead)), totals))[1]
