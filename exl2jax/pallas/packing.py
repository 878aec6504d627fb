"""Packing codes into words, one thread per column: `ops.bitstream.pack_codes` as a kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from exl2jax.pallas.launch import launch, shape
from exl2jax.pallas.tiles import LANES, Tiles, pad_columns


def pack_codes(codes: jax.Array, *, bits: int, tiles: Tiles) -> jax.Array:
    """Pack `codes [rows, N]` uint8 into `[rows * bits / 32, N]` int32; `rows` a multiple of 32."""
    rows, columns = codes.shape
    codes = pad_columns(codes)
    run = launch(
        partial(_body, bits=bits),
        shape((rows * bits // 32, codes.shape[1]), jnp.uint32),
        {"tiles": rows // 32, "columns": codes.shape[1] // LANES},
        tiles,
    )
    return lax.bitcast_convert_type(run(codes)[:, :columns], jnp.int32)


def _body(codes: Any, words: Any, *, bits: int) -> None:
    """One program: 32 rows of `LANES` columns, which fill `bits` words a column."""
    columns = pl.ds(lax.axis_index("columns") * LANES, LANES)
    tile = lax.axis_index("tiles")
    built = [jnp.zeros((LANES,), jnp.uint32) for _ in range(bits)]
    for r in range(32):
        value = codes[tile * 32 + r, columns].astype(jnp.uint32)
        word, shift = divmod(r * bits, 32)
        built[word] = built[word] | (value << jnp.uint32(shift))
        if shift + bits > 32:
            built[word + 1] = built[word + 1] | (value >> jnp.uint32(32 - shift))
    for i, word in enumerate(built):
        words[tile * bits + i, columns] = word
