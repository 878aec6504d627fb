"""The inner loop of the scale searches: what rounding the columns of a group at given scales loses."""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.ops.groups import TOP, Begin

UNROLL = 32
"""Rows per step of the inner loop: the whole chain of a column stays in registers. Group rows are multiples of 32."""

BLOCK_COLUMNS = 192
"""Most columns of a block: 32 rows of it stay in a first-level cache while all scales go over them."""


MULTIPLIERS = np.linspace(0.5, 1.2, 8, dtype=np.float32)
"""Multipliers tried for `q_scale_max` where every column finds its own index, which does the fine work."""

OFFSETS = np.arange(-5, 4, dtype=np.float32)
"""Indices tried for a column, from the one whose scale just holds its widest weight: two bits want half of that scale,
eight bits of few rows at times a little more. All sixteen would lower the loss by a percent, by three or so where
outliers have two bits.
"""

MAX_INDEX = 16


class ScaleLosses(Protocol):
    """The contract of `scale_losses`, for other implementations."""

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


class IndexLosses(Protocol):
    """The contract of `index_losses`, for other implementations."""

    def __call__(
        self,
        w: jax.Array,
        base: jax.Array,
        smax: jax.Array,
        codes: jax.Array,
        importance: jax.Array,
        begin: Begin = TOP,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Least losses and their indices of `w [size, N]`."""
        ...


def rounding_error(x: jax.Array, p: jax.Array, inverse: jax.Array, limits: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`|clamp(rint(x / p)) p - x|` of values at scales `p`, with their inverse and the limits of the codes."""
    return jnp.abs(jnp.clip(jnp.round(x * inverse), *limits) * p - x)


def raised(z: jax.Array, weight: jax.Array | None) -> jax.Array:
    """The loss of errors `z >= 0` of a row: their squares times the row's weight, or stock's 3.5th power."""
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
        trials = (p, 1 / p, (-codes / 2, codes / 2 - 1))

        def tile(i: jax.Array, total: jax.Array) -> jax.Array:
            rows = lax.dynamic_index_in_dim(tiles, i, 0, keepdims=False)
            own = None if weights is None else lax.dynamic_index_in_dim(weights, i, 0, keepdims=False)
            return _with_tile(total, rows, own, trials)

        return lax.fori_loop(0, count, tile, jnp.zeros((len(p), width), jnp.float32))

    tiles = of_block(x.reshape(size // UNROLL, UNROLL, columns), 0)
    losses = lax.map(block, (tiles, of_block(scales, 1), of_block(jnp.atleast_1d(codes), 1)))
    return losses.transpose(1, 0, 2).reshape(len(scales), -1)[:, :columns]


type Trials = tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]
"""The scales that a block tries, `[S, 1]` or `[S, width]`, their inverses, and the limits of the codes."""


@jax.jit  # traced once for all matrices, whose blocks are alike
def _with_tile(total: jax.Array, rows: jax.Array, weights: jax.Array | None, trials: Trials) -> jax.Array:
    """The losses `total [S, width]` with those of `UNROLL` more `rows` added, row after row."""
    own = [None] * UNROLL if weights is None else jnp.unstack(weights)
    for row, weight in zip(jnp.unstack(rows), own, strict=True):
        total = _with_row(total, row, weight, trials)
    return total


@jax.jit  # traced once for all rows
def _with_row(total: jax.Array, row: jax.Array, weight: jax.Array | None, trials: Trials) -> jax.Array:
    return total + raised(rounding_error(row, *trials), weight)


def by_column(of_matrix: jax.Array, columns: int) -> jax.Array:
    """A value of each of some matrices side by side, `[..., matrices]`, for all their columns, `[..., columns]`."""
    lead, count = of_matrix.shape[:-1], of_matrix.shape[-1]
    return jnp.broadcast_to(of_matrix[..., None], (*lead, count, columns // count)).reshape(*lead, columns)


@partial(jax.jit, static_argnames="losses_of")
def index_losses(
    w: jax.Array,
    base: jax.Array,
    smax: jax.Array,
    codes: jax.Array,
    importance: jax.Array,
    begin: Begin = TOP,
    rows: jax.Array | None = None,
    *,
    losses_of: ScaleLosses = scale_losses,
) -> tuple[jax.Array, jax.Array]:
    """For each of `MULTIPLIERS` and each column, the least squared error over `OFFSETS` and the index of its scale.

    Both `[multipliers, N]` float32. `smax [matrices]` is the largest of the scales `base [N]` that just hold each
    column of the group `w [size, N]`, and the unit of losses. The group begins at row `begin.row` of
    `importance`, of which only the ratios count. `codes` and `rows` as `losses_of` has them.
    """
    importance = lax.dynamic_slice_in_dim(importance, begin.row, len(w))
    if rows is not None:
        importance = jnp.where(jnp.arange(len(w)) < rows, importance, 0.0)
    importance, smax = importance / jnp.max(importance), by_column(smax, len(base))
    p = jnp.asarray(MULTIPLIERS)[:, None, None]
    holds = jnp.round(jnp.sqrt(base / (smax * p)) * MAX_INDEX)
    qs = jnp.clip(holds + jnp.asarray(OFFSETS)[:, None], 1, MAX_INDEX)  # [multipliers, offsets, N]
    scales = jnp.square(qs / MAX_INDEX) * p
    losses = losses_of(w / smax, scales.reshape(-1, w.shape[1]), codes, importance, rows).reshape(qs.shape)
    own = jnp.argmin(losses, axis=1)[:, None]
    return jnp.min(losses, axis=1), jnp.take_along_axis(qs, own, axis=1)[:, 0]
