"""The walk over the rows of a group, one thread per column: `ops.walk.walk_group` as a kernel.

A tile of rows lives in registers. It first takes up what it owes to the rows before it, whose errors lie in shared
memory, then goes row by row, each row paying its error forward to the rest of its tile at once.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from exl2jax.ops.groups import Begin
from exl2jax.pallas.launch import launch, shape, zeros
from exl2jax.pallas.tiles import LANES, Tiles, pad_columns


def walk_group(
    w: jax.Array,
    u: jax.Array,
    begin: Begin,
    scale: jax.Array,
    bits: jax.Array,
    rows: jax.Array | None = None,
    shift: jax.Array | None = None,
    *,
    tiles: Tiles,
) -> tuple[jax.Array, jax.Array]:
    """Scaled errors float32 and codes uint8 of a group `w [size, N]`, which `begin`s at a row of `u [K, K]`.

    `scale [N]` are the working scales; `bits` is one width or one for each column `[N]`, so that one matrix at several
    widths walks side by side. Where the group has fewer `rows` than `w`, the rest of the result is zero. A `shift
    [size, N]` is taken off the current weights before they are rounded.
    """
    size, columns = w.shape
    zero = jnp.broadcast_to(jnp.exp2(bits.astype(jnp.float32) - 1), (columns,))
    w, scale, zero = (pad_columns(x) for x in (w, scale, zero))
    run = launch(
        partial(_body, size=size, step=begin.step, tiles=tiles, shifted=shift is not None),
        (shape(w.shape, jnp.float32), shape(w.shape, jnp.uint8)),
        {"columns": w.shape[1] // LANES},
        tiles,
        (plgpu.SMEM((size, LANES), jnp.float32),),
    )
    counted = () if rows is None else (rows,)
    shifts = () if shift is None else (pad_columns(shift),)
    scalars = (jnp.asarray(x, jnp.int32).reshape(1) for x in (begin.steps, *counted))
    errors, codes = run(w, u, scale, zero, *shifts, *scalars)
    return errors[:, :columns], codes[:, :columns]


def _body(
    w: Any, u: Any, scales: Any, levels: Any, *rest: Any, size: int, step: int, tiles: Tiles, shifted: bool
) -> None:
    """One program: `LANES` columns. `past [size, LANES]` in shared memory holds their errors so far."""
    *shift, begin = rest[: 1 + shifted]
    *counted, errors, codes, past = rest[1 + shifted :]
    count, rows = (counted[0][0] if counted else size), tiles.walk_rows
    columns = pl.ds(lax.axis_index("columns") * LANES, LANES)
    scale, zero, at = scales[columns], levels[columns], begin[0] * step

    def tile(t: jax.Array, carry: None) -> None:
        a = t * rows
        owed = tuple(w[a + r, columns] for r in range(rows))
        # All loads come before the first store, past which no compiler may move them, so that they wait together.
        corner = [[u[at + a + r, at + a + later] for later in range(r, rows)] for r in range(rows)]
        inverses = [1 / row[0] for row in corner]

        def take_up(i: jax.Array, owed: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            taken = [i * tiles.taken_up + j for j in range(tiles.taken_up)]
            toward = [[u[at + j, at + a + r] for r in range(rows)] for j in taken]
            for error, into in zip([past[j] for j in taken], toward, strict=True):
                owed = tuple(x - share * error for x, share in zip(owed, into, strict=True))
            return owed

        current = list(lax.fori_loop(0, a // tiles.taken_up, take_up, owed))
        for r in range(rows):
            moved = current[r] - shift[0][a + r, columns] if shifted else current[r]
            steps = jnp.where(scale > 0, moved / scale, 0.0)
            code = jnp.clip(jnp.round(steps) + zero, 0.0, 2 * zero - 1)
            error = (current[r] - _half((code - zero) * scale)) * inverses[r]
            past[a + r] = error
            errors[a + r, columns] = error
            codes[a + r, columns] = code.astype(jnp.int32).astype(jnp.uint8)
            for later in range(r + 1, rows):
                current[later] = current[later] - corner[r][later - r] * error
        return carry

    lax.fori_loop(0, count // rows, tile, None)
    if counted:
        lax.fori_loop(count, size, partial(_clear, errors, codes, columns, tiles), None)


def _clear(errors: Any, codes: Any, columns: Any, tiles: Tiles, row: jax.Array, carry: None) -> None:
    """Zero a row that is no part of the group."""
    errors[row, columns] = zeros(jnp.float32, tiles)
    codes[row, columns] = zeros(jnp.uint8, tiles)


def _half(x: jax.Array) -> jax.Array:
    """Round to float16 and back; the conversions are instructions of the kernel, which nothing folds away."""
    return x.astype(jnp.float16).astype(jnp.float32)
