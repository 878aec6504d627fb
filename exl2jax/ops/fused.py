"""The inner loops in few launches, for GPUs that the kernels of `exl2jax.pallas` are not made for.

On a GPU XLA launches every step of a loop, and waits for the host where a length or a branch is not known in advance.
A launch takes as long as millions of operations. So nothing here branches: a walk takes a tile of rows in each step,
whose chain XLA fuses, and the losses of all scales are one reduction over the rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from exl2jax.ops.bitstream import pack_tiles
from exl2jax.ops.groups import Begin
from exl2jax.ops.kernels import PANEL, Kernels
from exl2jax.ops.rounding import dequantize, quantize
from exl2jax.ops.scale_losses import index_losses, raised, rounding_error

TILE = 8
"""Rows of a tile: as many as XLA fuses into one launch; it cuts the chain of 16 in pieces."""

FEW_BLOCKS = 4
"""Most blocks of columns for the feedback between columns: every block walks the rows by itself."""


def walk_group(
    w: jax.Array,
    u: jax.Array,
    begin: Begin,
    scale: jax.Array,
    bits: jax.Array,
    rows: jax.Array | None = None,
    shift: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Errors and codes of a group, as `ops.walk.walk_group`, tile by tile.

    The errors of a group make `W - Q = U^T E`, from which the codes follow at once: within a walk they would be another
    launch a tile, and another computation, which need not round alike.
    """
    size = len(w)
    u = lax.dynamic_slice(u, (begin.row, begin.row), (size, size))
    toward, moved = -u.T, jnp.zeros_like(w) if shift is None else shift

    def tile(i: jax.Array, errors: jax.Array) -> jax.Array:
        first = i * TILE
        mine, feedback, off = (lax.dynamic_slice_in_dim(x, first, TILE) for x in (w, toward, moved))
        current = mine + jnp.matmul(feedback, errors, precision=lax.Precision.HIGHEST)
        corner = lax.dynamic_slice(u, (first, first), (TILE, TILE))
        return lax.dynamic_update_slice_in_dim(errors, _errors(current, corner, scale, bits, off), first, 0)

    errors = lax.fori_loop(0, size // TILE, tile, jnp.zeros_like(w))
    counts = jnp.bool_(True) if rows is None else (jnp.arange(size) < rows)[:, None]
    errors = jnp.where(counts, errors, 0.0)  # those beyond may be anything: the factor ends there
    codes = quantize(w + jnp.matmul(toward, errors, precision=lax.Precision.HIGHEST), scale, bits)
    return errors, jnp.where(counts, codes, 0.0).astype(jnp.uint8)


def _errors(w: jax.Array, u: jax.Array, scale: jax.Array, bits: jax.Array, shift: jax.Array) -> jax.Array:
    """Errors of `TILE` rows `w [TILE, N]`, with `u [TILE, TILE]` between them."""
    errors = list[jax.Array]()
    for r in range(TILE):
        current = w[r] - sum((u[k, r] * error for k, error in enumerate(errors)), jnp.zeros_like(scale))
        code = quantize(current - shift[r], scale, bits)
        errors.append((current - dequantize(code, scale, bits)) / u[r, r])
    return jnp.stack(errors)


def scale_losses(
    x: jax.Array,
    scales: jax.Array,
    codes: jax.Array,
    importance: jax.Array | None = None,
    rows: jax.Array | None = None,
) -> jax.Array:
    """Losses `[S, N]`, as `ops.scale_losses.scale_losses`, in one reduction over the rows."""
    if rows is not None:
        x = jnp.where((jnp.arange(len(x)) < rows)[:, None], x, 0.0)  # what is zero loses nothing
    p, weight = scales[:, None], None if importance is None else importance[:, None]
    return jnp.sum(raised(rounding_error(x, p, 1 / p, (-codes / 2, codes / 2 - 1)), weight), axis=1)


FUSED = Kernels(
    scale_losses, partial(index_losses, losses_of=scale_losses), walk_group, pack_tiles, panel=PANEL, blocks=FEW_BLOCKS
)
"""The implementation of this room for GPUs without kernels of their own."""
