"""Packing codes into words, one thread per column: `ops.bitstream.pack_tiles` as a kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from exl2jax.pallas.launch import launch, shape, zeros
from exl2jax.pallas.tiles import LANES, Tiles, pad_columns
from exl2jax.qparams import FORMAT_BITS, ROW_MULTIPLE

WORDS = max(FORMAT_BITS)
"""Words of a tile's column at the widest codes; 32 rows of `b` bits fill `b` words."""


def pack_tiles(codes: jax.Array, bits: jax.Array, *, tiles: Tiles) -> jax.Array:
    """Pack `codes [K, N]` uint8 tile by tile of 32 rows at the widths `bits [K / 32]`: `[K / 32, 8, N]` int32."""
    rows, columns = codes.shape
    codes, count = pad_columns(codes), rows // ROW_MULTIPLE
    run = launch(
        partial(_body, tiles=tiles),
        shape((count * WORDS, codes.shape[1]), jnp.uint32),
        {"tiles": count, "columns": codes.shape[1] // LANES},
        tiles,
    )
    words = run(codes, bits.astype(jnp.int32))[:, :columns]
    return lax.bitcast_convert_type(words, jnp.int32).reshape(count, WORDS, columns)


def _body(codes: Any, widths: Any, words: Any, *, tiles: Tiles) -> None:
    """One program: 32 rows of `LANES` columns, whose codes go through one word after the other."""
    columns = pl.ds(lax.axis_index("columns") * LANES, LANES)
    tile = lax.axis_index("tiles")
    bits = widths[tile]
    nothing = zeros(jnp.uint32, tiles)

    def add(r: jax.Array, word: jax.Array) -> jax.Array:
        """Put a code into the current word, store that, and begin the next where it is full."""
        value = codes[tile * ROW_MULTIPLE + r, columns].astype(jnp.uint32)
        place, shift = r * bits // 32, r * bits % 32
        word = word | (value << shift.astype(jnp.uint32))
        words[tile * WORDS + place, columns] = word
        rest = value >> jnp.where(shift > 0, 32 - shift, 0).astype(jnp.uint32)
        rest = jnp.where(shift + bits > 32, rest, nothing)
        return jnp.where(shift + bits >= 32, rest, word)

    for i in range(WORDS):
        words[tile * WORDS + i, columns] = nothing
    lax.fori_loop(0, ROW_MULTIPLE, add, nothing)
