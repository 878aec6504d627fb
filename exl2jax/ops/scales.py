"""The scale search of a group: one 4-bit index per column, one maximum per group, one multiplier out of 97."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.ops.rounding import HALF_MAX, half_scale

GRID = np.asarray([0.70 * (1 - i / 96) + 1.20 * i / 96 for i in range(97)], np.float32)
"""Multipliers tried for `q_scale_max`."""

UNROLL = 32
"""Rows per step of the inner loop: the whole chain of a column stays in registers. Group rows are multiples of 32."""

BLOCK_COLUMNS = 192
"""Most columns of a block: 32 rows of it stay in a first-level cache while all multipliers go over them."""


class ScaleChoice(NamedTuple):
    """Scales of one group: `qs [N]` index 1..16, `qscale_max []` as exact half, `scale [N]` the working scale."""

    qs: jax.Array
    qscale_max: jax.Array
    scale: jax.Array
    multiplier: jax.Array


type GridLosses = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""What `grid_losses` is, for whoever computes it otherwise."""


def search_scales(w: jax.Array, bits: jax.Array, losses_of: GridLosses | None = None) -> ScaleChoice:
    """Choose the scales of the group `w [rows, N]` float32 at the width `bits` (scalar, may be traced).

    Minimises `sum |clamp(rint(w / (s p))) s p - w|^3.5` over the 97 multipliers `p`, the same for every column of the
    group; `rows` must be a multiple of 32. `losses_of` replaces `grid_losses`. EXL2.md section 2, "Scales of a group".
    """
    codes = jnp.exp2(bits.astype(jnp.float32))
    base = (jnp.max(jnp.abs(w), axis=0) + 1e-12) / ((codes - 1) / 2)
    smax = jnp.max(base)
    qs = jnp.clip(jnp.round(jnp.sqrt(base / smax) * 16), 1, 16)
    steps = w / (jnp.square(qs / 16) * smax)
    losses = (losses_of or grid_losses)(steps, (qs / 16) ** 7, codes)
    multiplier = jnp.asarray(GRID)[jnp.argmin(losses)]
    qscale_max = jnp.minimum(smax * multiplier, HALF_MAX).astype(jnp.float16)
    return ScaleChoice(qs.astype(jnp.uint8), qscale_max, half_scale(qscale_max, qs), multiplier)


def grid_losses(steps: jax.Array, column_weight: jax.Array, codes: jax.Array) -> jax.Array:
    """Loss of every multiplier `[97]`, up to a common factor.

    `steps` are the weights in units of the base scale, so the loss of a column at multiplier `p` is
    `s^3.5 sum |clamp(rint(x / p)) p - x|^3.5`, and `s^3.5` is `(qs / 16)^7` times a constant. Columns go in blocks,
    padded with zeros, whose loss is zero.
    """
    rows, columns = steps.shape
    blocks = -(-columns // BLOCK_COLUMNS)
    width = -(-columns // (16 * blocks)) * 16
    extra = blocks * width - columns
    tiles = jnp.pad(steps, ((0, 0), (0, extra))).reshape(rows // UNROLL, UNROLL, blocks, width)
    weights = jnp.pad(column_weight, (0, extra)).reshape(blocks, width)
    low, high = -codes / 2, codes / 2 - 1
    p = jnp.asarray(GRID)[:, None]
    inverse = 1 / p

    def tile(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        block, total = state
        x = lax.dynamic_index_in_dim(block, i, 0, keepdims=False)
        for r in range(UNROLL):
            z = jnp.abs(jnp.clip(jnp.round(x[r] * inverse), low, high) * p - x[r])
            total = total + z * z * z * jnp.sqrt(z)
        return block, total

    def block(tiles: jax.Array, weights: jax.Array) -> jax.Array:
        zero = jnp.zeros((len(GRID), width), jnp.float32)
        _, total = lax.fori_loop(0, rows // UNROLL, tile, (tiles, zero))
        return total @ weights  # a product, lest the sum be fused into the loop above and undo its vectors

    return jnp.sum(lax.map(lambda x: block(*x), (tiles.transpose(2, 0, 1, 3), weights)), axis=0)
