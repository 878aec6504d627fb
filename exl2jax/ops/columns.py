"""Error feedback between the columns of a linear: what rounding one output does is taken up by the outputs after it.

With `H_O [N, N]` the second moment of the gradients at a linear's outputs and `H_I [K, K]` that of its inputs, an error
`E [K, N]` of the weights costs about `tr(H_O E^T H_I E)`. GPTQ's walk over rows heeds `H_I`; within a row, this makes
up for the error of each column in the columns after it. For `M = H_O`, shrunk and damped, and `M^-1 = U^T U`, rounding
`W - Q = U_I^T e U` column after column minimises the cost greedily, as the walk does over rows.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from exl2jax.ops.groups import Begin
from exl2jax.ops.hessian import factorize, gram
from exl2jax.ops.kernels import BLOCKS, WalkGroup

DAMPING = 1e-3
"""Share of the mean diagonal added to the diagonal of a shrunk Hessian of outputs."""

BLOCK_MULTIPLE = 16
"""Columns of a block are a multiple of this."""


class ColumnFeedback(NamedTuple):
    """The factored Hessian of a linear's outputs: `perm [N]` columns by descending diagonal, `toward [B, N', N' / B]`.

    `toward[b, k, n]` is how much of the error of column `k` is taken off the `n`-th column of the later block `b`, in
    that order. `N'` is `N` padded to whole blocks.
    """

    perm: jax.Array
    toward: jax.Array


def block_columns(columns: int, blocks: int) -> int:
    """Columns of a block, of at most so many `blocks`."""
    return -(-columns // (blocks * BLOCK_MULTIPLE)) * BLOCK_MULTIPLE


@partial(jax.jit, static_argnames="blocks")
def column_feedback(
    samples: jax.Array, scale: jax.Array, shrinkage: jax.Array | float, *, blocks: int = BLOCKS
) -> ColumnFeedback:
    """Factor the Hessian of outputs of gradients `samples [S, N]`, in units of `scale [N]`, their root mean square.

    `shrinkage` (0 to 1) draws the correlations towards zero: few tokens know little of them. An output without
    gradients gives and takes nothing, nor does any where the factorization fails.
    """
    columns = len(scale)
    moments = gram(samples.astype(jnp.float32))
    inverse = _safe_inverse(jnp.sqrt(jnp.diagonal(moments)))
    root = scale * _safe_inverse(jnp.sqrt(jnp.mean(jnp.square(scale))))
    together = (1 - shrinkage) * moments * (root * inverse) * (root * inverse)[:, None]
    hessian = jnp.where(jnp.eye(columns, dtype=bool), jnp.square(root), together)
    factor = factorize(hessian, damping=_little)
    block = block_columns(columns, blocks)
    count = -(-columns // block)
    u = jnp.eye(count * block).at[:columns, :columns].set(factor.u)
    tiles = u.reshape(count, block, -1)
    corners = jax.vmap(lambda i, tile: lax.dynamic_slice_in_dim(tile, i * block, block, 1))(jnp.arange(count), tiles)
    toward = jax.scipy.linalg.solve_triangular(corners, tiles, lower=False).reshape(u.shape)
    toward = jnp.where(factor.ok, toward, jnp.eye(len(u)))
    return ColumnFeedback(factor.perm, toward.reshape(-1, count, block).swapaxes(0, 1))


def _safe_inverse(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1.0), 0.0)


def _little(h: jax.Array) -> tuple[jax.Array, float]:
    return jnp.maximum(DAMPING * jnp.mean(jnp.diagonal(h)), DAMPING), 10.0


def walk_columns(
    walk: WalkGroup,
    toward: jax.Array,
    w: jax.Array,
    u: jax.Array,
    begin: Begin,
    scale: jax.Array,
    bits: jax.Array,
    rows: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`walk` a group `w [size, N]` block of columns by block, each shifted by what earlier blocks lost in its row.

    With `t` the current weights of a row, `t'` those less the shift and `q` their codes' values, a row's error for the
    rows after it stays `(t - q) / U_rr`, and `t' - q` is what the blocks after it take up. So the order of rows and
    columns may be swapped: a block needs only whole columns before it, and its shift is one product.
    """
    size, columns = w.shape
    count, padded, block = toward.shape
    diagonal = lax.dynamic_slice_in_dim(jnp.diagonal(u), begin.row, size)[:, None]
    w = jnp.pad(w, ((0, 0), (0, padded - columns)))
    scale = jnp.pad(scale, (0, padded - columns))

    def one(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        missed, errors, codes = state
        at = j * block
        into = lax.dynamic_index_in_dim(toward, j, 0, keepdims=False)
        shift = jnp.matmul(missed, into, precision=lax.Precision.HIGHEST)
        own = lax.dynamic_slice_in_dim(w, at, block, 1)
        error, code = walk(own, u, begin, lax.dynamic_slice_in_dim(scale, at, block), bits, rows, shift)
        return (
            lax.dynamic_update_slice_in_dim(missed, error * diagonal - shift, at, 1),
            lax.dynamic_update_slice_in_dim(errors, error, at, 1),
            lax.dynamic_update_slice_in_dim(codes, code, at, 1),
        )

    start = (jnp.zeros_like(w), jnp.zeros_like(w), jnp.zeros(w.shape, jnp.uint8))
    _, errors, codes = lax.fori_loop(0, count, one, start)
    return errors[:, :columns], codes[:, :columns]
