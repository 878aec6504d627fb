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

    def __call__(
        self, x: jax.Array, scales: jax.Array, codes: jax.Array, importance: jax.Array | None = None
    ) -> jax.Array:
        """Losses `[S, N]` of `x [rows, N]` at `scales`."""
        ...


def raised(z: jax.Array, weight: jax.Array | None) -> jax.Array:
    """What errors `z >= 0` of a row lose: their squares times the row's weight, or stock's 3.5th power."""
    return z * z * z * jnp.sqrt(z) if weight is None else z * z * weight


def scale_losses(x: jax.Array, scales: jax.Array, codes: jax.Array, importance: jax.Array | None = None) -> jax.Array:
    """Loss of every column at every scale, `[S, N]` float32, with errors `z = |clamp(rint(x / s)) s - x|`.

    `sum_r importance_r z_r^2` where rows have an `importance [rows]`, stock's `sum_r z_r^3.5` where not. `x [rows, N]`
    float32 with `rows` a multiple of 32; `scales [S, 1]`, the same for all columns, or `[S, N]`, all positive; `codes`
    the number of levels (scalar). Columns go in blocks, padded with zeros.
    """
    rows, columns = x.shape
    blocks = -(-columns // BLOCK_COLUMNS)
    width = -(-columns // (16 * blocks)) * 16
    pad = ((0, 0), (0, blocks * width - columns))
    tiles = jnp.pad(x, pad).reshape(rows // UNROLL, UNROLL, blocks, width).transpose(2, 0, 1, 3)
    weights = None if importance is None else importance.reshape(rows // UNROLL, UNROLL)
    low, high = -codes / 2, codes / 2 - 1

    def block(tiles: jax.Array, p: jax.Array) -> jax.Array:
        inverse = 1 / p

        def tile(i: jax.Array, total: jax.Array) -> jax.Array:
            rows = lax.dynamic_index_in_dim(tiles, i, 0, keepdims=False)
            own = None if weights is None else lax.dynamic_index_in_dim(weights, i, 0, keepdims=False)
            for r in range(UNROLL):
                z = jnp.abs(jnp.clip(jnp.round(rows[r] * inverse), low, high) * p - rows[r])
                total = total + raised(z, None if own is None else own[r])
            return total

        return lax.fori_loop(0, len(tiles), tile, jnp.zeros((len(p), width), jnp.float32))

    if scales.shape[1] == 1:
        losses = lax.map(lambda t: block(t, scales), tiles)
    else:
        own = jnp.pad(scales, pad, constant_values=1).reshape(len(scales), blocks, width).transpose(1, 0, 2)
        losses = lax.map(lambda both: block(*both), (tiles, own))
    return losses.transpose(1, 0, 2).reshape(len(scales), -1)[:, :columns]
