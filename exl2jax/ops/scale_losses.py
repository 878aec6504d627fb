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
        self,
        x: jax.Array,
        scales: jax.Array,
        codes: jax.Array,
        importance: jax.Array | None = None,
        rows: jax.Array | None = None,
    ) -> jax.Array:
        """Losses `[S, N]` of `x [size, N]` at `scales`."""
        ...


def raised(z: jax.Array, weight: jax.Array | None) -> jax.Array:
    """What errors `z >= 0` of a row lose: their squares times the row's weight, or stock's 3.5th power."""
    return z * z * z * jnp.sqrt(z) if weight is None else z * z * weight


def scale_losses(
    x: jax.Array,
    scales: jax.Array,
    codes: jax.Array,
    importance: jax.Array | None = None,
    rows: jax.Array | None = None,
) -> jax.Array:
    """Loss of every column at every scale, `[S, N]` float32, with errors `z = |clamp(rint(x / s)) s - x|`.

    `sum_r importance_r z_r^2` where rows have an `importance [size]`, stock's `sum_r z_r^3.5` where not. `x [size, N]`
    float32 with `size` a multiple of 32, of which the first `rows` count (traced, a multiple of 32, all by default);
    `scales [S, 1]`, the same for all columns, or `[S, N]`, all positive; `codes` the number of levels, one for all
    columns or `[N]`. Columns go in blocks, padded with zeros.
    """
    size, columns = x.shape
    blocks = -(-columns // BLOCK_COLUMNS)
    width = -(-columns // (16 * blocks)) * 16
    count = size // UNROLL if rows is None else rows // UNROLL
    weights = None if importance is None else importance.reshape(size // UNROLL, UNROLL)

    def of_block(x: jax.Array, value: int) -> jax.Array:
        """The last axis cut into blocks, which come first; one value for all columns stays."""
        if x.shape[-1] != columns:
            return jnp.broadcast_to(x, (blocks, *x.shape))
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * width - columns)], constant_values=value)
        return jnp.moveaxis(padded.reshape(*x.shape[:-1], blocks, width), -2, 0)

    def block(operands: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        tiles, p, codes = operands
        inverse, low, high = 1 / p, -codes / 2, codes / 2 - 1

        def tile(i: jax.Array, total: jax.Array) -> jax.Array:
            rows = lax.dynamic_index_in_dim(tiles, i, 0, keepdims=False)
            own = None if weights is None else lax.dynamic_index_in_dim(weights, i, 0, keepdims=False)
            for r in range(UNROLL):
                z = jnp.abs(jnp.clip(jnp.round(rows[r] * inverse), low, high) * p - rows[r])
                total = total + raised(z, None if own is None else own[r])
            return total

        return lax.fori_loop(0, count, tile, jnp.zeros((len(p), width), jnp.float32))

    tiles = of_block(x.reshape(size // UNROLL, UNROLL, columns), 0)
    losses = lax.map(block, (tiles, of_block(scales, 1), of_block(jnp.atleast_1d(codes), 1)))
    return losses.transpose(1, 0, 2).reshape(len(scales), -1)[:, :columns]
