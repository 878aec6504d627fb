"""GPTQ of a whole matrix with mixed bit widths and group sizes, and plain rounding to nearest."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.ops.hessian import HessianFactor
from exl2jax.ops.kernels import XLA, Kernels
from exl2jax.ops.rounding import dequantize, half_scale
from exl2jax.ops.scales import ScaleSearch, search_scales
from exl2jax.qparams import ROW_MULTIPLE, Group

_PANEL = 256
"""Rows of past errors that one product of the feedback takes up."""


class QuantizedLinear(NamedTuple):
    """A quantized matrix in packed row order.

    `codes [K, N]` uint8, `qs [G, N]` uint8 scale index 1..16, `qscale_max [G]` float16, `perm [K]` with packed row `i`
    being original row `perm[i]`, `groups` the cut, `weight [K, N]` float16: the dequantized matrix in original order.
    """

    codes: jax.Array
    qs: jax.Array
    qscale_max: jax.Array
    perm: jax.Array
    groups: tuple[Group, ...]
    weight: jax.Array


class _Walk(NamedTuple):
    """State of the walk: scaled errors and codes by row, scales by tile of 32 rows (a group writes its first tile)."""

    errors: jax.Array
    codes: jax.Array
    qs: jax.Array
    qscale_max: jax.Array


class _WalkOptions(NamedTuple):
    """What a walk is made of: the search of a group's scales, and the inner loops."""

    search: ScaleSearch
    kernels: Kernels


def gptq(
    w: jax.Array,
    factor: HessianFactor,
    groups: Sequence[Group],
    kernels: Kernels = XLA,
    search: ScaleSearch = search_scales,
) -> QuantizedLinear:
    """Quantize `w [K, N]` float32 with error feedback through `factor`, cut into `groups` of the permuted rows.

    Each group finds its scales on its current weights, then goes row by row: code, error `(w - q) / U[c, c]`, and
    feedback to the rows after it (docs/format.md 2.5). Left-looking: a row gathers what it owes to the rows
    before it, `W[i] - U[:i, i]^T E[:i]`, which is the same sum in another order. Bit widths are traced and runs of one
    group size are loops, so one compilation per (shape, group size) serves every setting. `kernels`: inner loops;
    `search`: how a group finds its scales.
    """
    walk = _walk(w[factor.perm], factor.u, groups, _WalkOptions(search, kernels))
    return _finish(walk.codes, walk.qs, walk.qscale_max, factor.perm, factor.inv_perm, tuple(groups))


def gptq_tile_losses(
    w: jax.Array,
    factor: HessianFactor,
    groups: Sequence[Group],
    column_weight: jax.Array,
    kernels: Kernels = XLA,
    search: ScaleSearch = search_scales,
) -> jax.Array:
    """What `gptq` of `w [K, N]` would cost, tile by tile of 32 permuted rows: `[K / 32]` float32.

    The sum over tiles is about `sum_n c_n (E^T H E)_nn` for the weight error `E` and `column_weight` `c [N]`. The
    walk's scaled errors give it without a product. They make `E = U^T e`, and `U (H + l I) U^T = I`, so that
    `E^T H E = e^T (I - l U U^T) e`; the errors of rows are rounded apart and uncorrelated, which leaves
    `sum_r e_r^2 (1 - l |U_r|^2)`: what rounding row `r` costs with all that later rows did to make up for it, never
    less than nothing however large the damping. A row's share depends little on how the rows before it were rounded, so
    the tiles of runs at single widths price any mixture of those widths.
    """
    walk = _walk(w[factor.perm], factor.u, groups, _WalkOptions(search, kernels))
    return walk_tile_losses(walk.errors, factor.u, factor.damping, column_weight)


def round_to_nearest(
    w: jax.Array,
    perm: jax.Array,
    groups: Sequence[Group],
    kernels: Kernels = XLA,
    search: ScaleSearch = search_scales,
) -> QuantizedLinear:
    """Quantize `w [K, N]` without feedback, scales as `gptq` finds them; for heads too large for a Hessian."""
    k, _ = w.shape
    identity = HessianFactor(perm, jnp.argsort(perm), jnp.eye(k), jnp.float32(0), jnp.int32(0), jnp.bool_(True))
    return gptq(w, identity, groups, kernels, search)


def _walk(ordered: jax.Array, u: jax.Array, groups: Sequence[Group], options: _WalkOptions) -> _Walk:
    """Walk the permuted weights from the first group to the last."""
    walk = _start(*ordered.shape)
    for size, start, widths in _segments(groups):
        walk = _segment(walk, ordered, u, jnp.int32(start), widths, size=size, options=options)
    return walk


def _start(rows: int, columns: int) -> _Walk:
    tiles = -(-rows // ROW_MULTIPLE)
    return _Walk(
        jnp.zeros((rows, columns), jnp.float32),
        jnp.zeros((rows, columns), jnp.uint8),
        jnp.ones((tiles, columns), jnp.uint8),
        jnp.zeros((tiles,), jnp.float16),
    )


def _segments(groups: Sequence[Group]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Runs of groups of one size: `(size, first row, widths [tiles of the matrix] float32 by group)`."""
    for size, run in groupby(groups, key=lambda g: g.rows):
        members = list(run)
        yield size, members[0].start, np.asarray([g.bits for g in members], np.float32)


@partial(jax.jit, static_argnames=("size", "options"), donate_argnames=("walk",))
def _segment_jit(
    walk: _Walk,
    w: jax.Array,
    u: jax.Array,
    start: jax.Array,
    widths: jax.Array,
    count: jax.Array,
    *,
    size: int,
    options: _WalkOptions,
) -> _Walk:
    """Quantize `count` groups of `size` rows from row `start`; `widths` holds the bits of each.

    Groups go in spans. What a span owes to the rows before it is one sum over past panels; only what its groups owe
    each other is gathered group by group.
    """
    span = _span(w.shape[0], size)
    stop = start + count * size

    def one(i: jax.Array, walk: _Walk) -> _Walk:
        a = start + i * span
        origin = jnp.minimum(a, w.shape[0] - span)
        current = lax.dynamic_slice_in_dim(w, origin, span, 0) - _debt(walk.errors, u, origin, a, span)
        corner = lax.dynamic_slice(u, (origin, origin), (span, span))
        return _walk_span(walk, current, corner, (origin, a, jnp.minimum(a + span, stop)), widths, start, size, options)

    return lax.fori_loop(0, (count * size + span - 1) // span, one, walk)


def _span(rows: int, size: int) -> int:
    """Rows of a span: whole groups, enough for efficient products, little enough to waste few on zeros."""
    target = 128 if rows < 2048 else 256
    return min(max(target // size, 1), rows // size) * size


def _debt(errors: jax.Array, u: jax.Array, origin: jax.Array, a: jax.Array, span: int) -> jax.Array:
    """What rows `origin .. origin + span` owe to the rows before `a`: `U[:a, rows]^T E[:a]`, panel by panel."""
    panel = min(_PANEL, errors.shape[0])

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        # Rows from `a` on have zero errors; a last panel that would overhang skips what the one before it added.
        first = jnp.minimum(i * panel, errors.shape[0] - panel)
        part = lax.dynamic_slice_in_dim(errors, first, panel, 0)
        toward = lax.dynamic_slice(u, (first, origin), (panel, span))
        fresh = jnp.where(first + jnp.arange(panel)[:, None] >= i * panel, toward, 0.0)
        return total + jnp.matmul(fresh.T, part, precision=lax.Precision.HIGHEST)

    return lax.fori_loop(0, (a + panel - 1) // panel, add, jnp.zeros((span, errors.shape[1]), jnp.float32))


def _walk_span(
    walk: _Walk,
    current: jax.Array,
    u: jax.Array,
    place: tuple[jax.Array, jax.Array, jax.Array],
    widths: jax.Array,
    start: jax.Array,
    size: int,
    options: _WalkOptions,
) -> _Walk:
    """Walk the groups of a span: `current [span, N]` and `u [span, span]` begin at row `origin`, the groups at row
    `a` and end at `stop`, where `place = (origin, a, stop)`.
    """  # noqa: D205
    origin, a, stop = place

    def group(i: jax.Array, state: tuple[_Walk, jax.Array]) -> tuple[_Walk, jax.Array]:
        walk, local = state
        row = a + i * size
        bits = widths[(row - start) // size]
        mine = lax.dynamic_slice_in_dim(current, row - origin, size, 0)
        corner = lax.dynamic_slice(u, (row - origin, row - origin), (size, size))
        if size < u.shape[0]:
            toward = lax.dynamic_slice_in_dim(u, row - origin, size, 1)
            mine = mine - jnp.matmul(toward.T, local, precision=lax.Precision.HIGHEST)
        choice = options.search(mine, bits, 1 / jnp.square(jnp.diagonal(corner)), options.kernels)
        errors, codes = options.kernels.walk_group(mine, corner, choice.scale, bits)
        tile = row // ROW_MULTIPLE
        walk = _Walk(
            lax.dynamic_update_slice_in_dim(walk.errors, errors, row, 0),
            lax.dynamic_update_slice_in_dim(walk.codes, codes, row, 0),
            lax.dynamic_update_index_in_dim(walk.qs, choice.qs, tile, 0),
            lax.dynamic_update_index_in_dim(walk.qscale_max, choice.qscale_max, tile, 0),
        )
        return walk, lax.dynamic_update_slice_in_dim(local, errors, row - origin, 0)

    walk, _ = lax.fori_loop(0, (stop - a) // size, group, (walk, jnp.zeros_like(current)))
    return walk


def _segment(
    walk: _Walk, w: jax.Array, u: jax.Array, start: jax.Array, widths: np.ndarray, *, size: int, options: _WalkOptions
) -> _Walk:
    """Call the compiled segment with `widths` padded to a length that depends on the matrix alone."""
    padded = np.zeros(walk.qs.shape[0], np.float32)
    padded[: len(widths)] = widths
    count = jnp.int32(len(widths))
    return _segment_jit(walk, w, u, start, jnp.asarray(padded), count, size=size, options=options)


def _finish(
    codes: jax.Array,
    qs: jax.Array,
    qscale_max: jax.Array,
    perm: jax.Array,
    inv_perm: jax.Array,
    groups: tuple[Group, ...],
) -> QuantizedLinear:
    """Collect the groups' scales and dequantize into original row order."""
    tile_of_group = np.asarray([g.start // ROW_MULTIPLE for g in groups])
    group, bits = groups_by_tile(groups)
    weight = _weights(codes, qs, qscale_max, tile_of_group[group], bits, inv_perm)
    return QuantizedLinear(codes, qs[tile_of_group], qscale_max[tile_of_group], perm, groups, weight)


def groups_by_tile(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """For each tile of 32 rows: the index of its group, and its width in bits, int32."""
    sizes = [g.rows // ROW_MULTIPLE for g in groups]
    return np.repeat(np.arange(len(groups)), sizes), np.repeat(np.asarray([g.bits for g in groups], np.int32), sizes)


@jax.jit
def walk_tile_losses(errors: jax.Array, u: jax.Array, damping: jax.Array, column_weight: jax.Array) -> jax.Array:
    """The losses of `gptq_tile_losses` from the scaled `errors [K, N]` of a walk with feedback through `u [K, K]`."""
    undamped = jnp.maximum(1 - damping * jnp.sum(jnp.square(u), axis=1), 0.0)
    rows = jnp.matmul(jnp.square(errors), column_weight, precision=lax.Precision.HIGHEST) * undamped
    return jnp.sum(rows.reshape(-1, ROW_MULTIPLE), axis=1)


def _dequantized(
    codes: jax.Array, qs: jax.Array, qscale_max: jax.Array, source: jax.Array, bits: jax.Array
) -> jax.Array:
    """Weights `[tiles, 32, N]` in permuted order, float32 holding exact half values."""
    scale = half_scale(qscale_max[source][:, None], qs[source])
    tiles = codes.reshape(-1, ROW_MULTIPLE, codes.shape[1])
    return dequantize(tiles, scale[:, None, :], bits[:, None, None])


@jax.jit
def _weights(
    codes: jax.Array, qs: jax.Array, qscale_max: jax.Array, source: jax.Array, bits: jax.Array, inv_perm: jax.Array
) -> jax.Array:
    """Dequantized float16 `[K, N]` in original order; `source` and `bits` map each tile of 32 rows to its group's."""
    weight = _dequantized(codes, qs, qscale_max, source, bits)
    return weight.astype(jnp.float16).reshape(codes.shape)[inv_perm]
