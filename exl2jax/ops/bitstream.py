"""Codes as bit streams down the columns, and back (docs/format.md 1.2)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.qparams import FORMAT_BITS, ROW_MULTIPLE


@partial(jax.jit, static_argnames=("bits",))
def pack_codes(codes: jax.Array, *, bits: int) -> jax.Array:
    """Pack `codes [rows, N]` of one group into `[rows * bits / 32, N]` int32; `rows` a multiple of 32.

    Row `r` occupies bits `r*bits .. r*bits + bits - 1` of its column's little-endian stream.
    """
    rows, columns = codes.shape
    tiles = codes.astype(jnp.uint32).reshape(rows // 32, 32, columns)
    first = np.arange(32, dtype=np.uint32) * bits  # bit of each row in its tile
    low, high = tiles << (first % 32)[:, None], tiles >> (32 - first % 32 & 31)[:, None]
    ends = np.searchsorted(first, 32 * np.arange(1, bits + 1))
    words = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        word = jnp.bitwise_or.reduce(low[:, start:end], axis=1)
        # The row before may reach into this word.
        words.append(word | high[:, start - 1] if first[start] % 32 else word)
    packed = jnp.stack(words, axis=1).reshape(rows * bits // 32, columns)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


def pack_tiles(codes: jax.Array, bits: jax.Array) -> jax.Array:
    """Pack `codes [K, N]` tile by tile of 32 rows, each at its width of `bits [K / 32]`: `[K / 32, 8, N]` int32.

    A tile of `b` bits fills the first `b` words of its eight; the others are zero. Codes must fit their width.
    """

    def of_width(width: int, tile: jax.Array) -> jax.Array:
        return jnp.pad(pack_codes(tile, bits=width), ((0, max(FORMAT_BITS) - width), (0, 0)))

    branches = [partial(of_width, width) for width in FORMAT_BITS]
    place = np.searchsorted(FORMAT_BITS, np.arange(max(FORMAT_BITS) + 1)).astype(np.int32)  # of each width
    index = jnp.asarray(place)[bits]
    tiles = codes.reshape(-1, ROW_MULTIPLE, codes.shape[1])
    return jax.lax.map(lambda both: jax.lax.switch(both[0], branches, both[1]), (index, tiles))


@jax.jit
def unpack_codes(words: jax.Array, bits: jax.Array) -> jax.Array:
    """Inverse of `pack_codes` for groups one after the other: `words [W, N]` int32 to `[rows, N]` uint8.

    `bits [rows]` int32 is the width of every row, traced: matrices of one shape share what is compiled. Words beyond
    the rows' are not read.
    """
    stream = jax.lax.bitcast_convert_type(words, jnp.uint32)
    first = jnp.cumsum(bits) - bits
    word, shift = first // 32, (first % 32).astype(jnp.uint32)[:, None]
    crosses = (first % 32 + bits > 32)[:, None]  # the last row of a group never does
    value = stream[word] >> shift | jnp.where(crosses, stream[word + 1] << (32 - shift & 31), 0)
    return (value & ((1 << bits.astype(jnp.uint32)) - 1)[:, None]).astype(jnp.uint8)
