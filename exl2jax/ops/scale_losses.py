"""The inner loop of the scale searches: what rounding the columns of a group at given scales loses."""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

UNROLL = 32
"""Rows per step of the inner loop: the whole chain of a column stays in registers. Group rows are multiples of 32."""

BLOCK_COLUMNS = 192
"""Most columns of a block: 32 rows of it stay in a first-level cache while all scales go over them."""


class ScaleLosses(Protocol):
    """What `scale_losses` is, for whoever computes it otherwise."""

    def __call__(self, x: jax.Array, scales: jax.Array, codes: jax.Array, *, squared: bool) -> jax.Array:
        """Losses `[S, N]` of `x [rows, N]` at `scales`."""
        ...


def raised(z: jax.Array, squared: bool) -> jax.Array:
    """Errors `z >= 0` to the power of the loss: 2, or the 3.5 of stock's search."""
    return z * z if squared else z * z * z * jnp.sqrt(z)


def scale_losses(x: jax.Array, scales: jax.Array, codes: jax.Array, *, squared: bool) -> jax.Array:
    """Loss of every column at every scale, `[S, N]` float32: `sum_r |clamp(rint(x / s)) s - x|^power`.

    `x [rows, N]` float32 with `rows` a multiple of 32; `scales [S, 1]`, the same for all columns, or `[S, N]`, all
    positive; `codes` the number of levels (scalar). The power is 2 where `squared`, else 3.5. Columns go in blocks,
    padded with zeros.
    """
    rows, columns = x.shape
    blocks = -(-columns // BLOCK_COLUMNS)
    width = -(-columns // (16 * blocks)) * 16
    pad = ((0, 0), (0, blocks * width - columns))
    tiles = jnp.pad(x, pad).reshape(rows // UNROLL, UNROLL, blocks, width).transpose(2, 0, 1, 3)
    low, high = -codes / 2, codes / 2 - 1

    def block(tiles: jax.Array, p: jax.Array) -> jax.Array:
        inverse = 1 / p

        def tile(i: jax.Array, total: jax.Array) -> jax.Array:
            rows = lax.dynamic_index_in_dim(tiles, i, 0, keepdims=False)
            for r in range(UNROLL):
                z = jnp.abs(jnp.clip(jnp.round(rows[r] * inverse), low, high) * p - rows[r])
                total = total + raised(z, squared)
            return total

        return lax.fori_loop(0, len(tiles), tile, jnp.zeros((len(p), width), jnp.float32))

    if scales.shape[1] == 1:
        losses = lax.map(lambda t: block(t, scales), tiles)
    else:
        own = jnp.pad(scales, pad, constant_values=1).reshape(len(scales), blocks, width).transpose(1, 0, 2)
        losses = lax.map(lambda both: block(*both), (tiles, own))
    return losses.transpose(1, 0, 2).reshape(len(scales), -1)[:, :columns]
