"""The sequential heart of GPTQ: one group of rows, each rounded with the errors of those before it."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from exl2jax.ops.groups import Begin
from exl2jax.ops.rounding import dequantize, quantize
from exl2jax.qparams import ROW_MULTIPLE


def walk_group(
    w: jax.Array,
    u: jax.Array,
    begin: Begin,
    scale: jax.Array,
    bits: jax.Array,
    rows: jax.Array | None = None,
    shift: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Walk the rows of one group `w [size, N]`, which `begin` at a row of `u [K, K]`.

    `scale [N]` are the working scales and `bits` the width, one for all columns or one for each. Where the group has
    fewer `rows` (traced, a multiple of 32), the rest of the result is zero. A `shift [size, N]` is taken off the
    current weights before they are rounded; their errors are still those of the weights themselves.
    """
    u = lax.dynamic_slice(u, (begin.row, begin.row), (len(w), len(w)))
    inverse = 1 / jnp.diagonal(u)
    if rows is None:
        return _walk(w, u, inverse, scale, bits, shift)
    sizes = range(ROW_MULTIPLE, len(w) + 1, ROW_MULTIPLE)
    branches = [partial(_walk_first, size) for size in sizes]
    return lax.switch(rows // ROW_MULTIPLE - 1, branches, w, u, inverse, scale, bits, shift)


def _walk_first(
    size: int,
    w: jax.Array,
    u: jax.Array,
    inverse: jax.Array,
    scale: jax.Array,
    bits: jax.Array,
    shift: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Walk the first `size` rows alone; zeros for the others."""
    own = None if shift is None else shift[:size]
    errors, codes = _walk(w[:size], u[:size, :size], inverse[:size], scale, bits, own)
    rest = ((0, len(w) - size), (0, 0))
    return jnp.pad(errors, rest), jnp.pad(codes, rest)


@jax.jit
def _walk(
    w: jax.Array, u: jax.Array, inverse: jax.Array, scale: jax.Array, bits: jax.Array, shift: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    def row(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        errors, codes = state
        toward = lax.dynamic_index_in_dim(u, i, 1, keepdims=False)
        current = lax.dynamic_index_in_dim(w, i, 0, keepdims=False) - jnp.matmul(
            toward, errors, precision=lax.Precision.HIGHEST
        )
        moved = current if shift is None else current - lax.dynamic_index_in_dim(shift, i, 0, keepdims=False)
        code = quantize(moved, scale, bits)
        error = (current - dequantize(code, scale, bits)) * inverse[i]
        return (
            lax.dynamic_update_index_in_dim(errors, error, i, 0),
            lax.dynamic_update_index_in_dim(codes, code.astype(jnp.uint8), i, 0),
        )

    return lax.fori_loop(0, w.shape[0], row, (jnp.zeros_like(w), jnp.zeros(w.shape, jnp.uint8)))
