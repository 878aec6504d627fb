"""GPTQ of a whole matrix with mixed bit widths and group sizes, and plain rounding to nearest."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.ops.groups import LARGEST_GROUP, GroupTable, group_table, span_rows
from exl2jax.ops.hessian import HessianFactor
from exl2jax.ops.kernels import XLA, Kernels
from exl2jax.ops.rounding import dequantize, half_scale
from exl2jax.ops.scales import ScaleSearch, search_scales
from exl2jax.qparams import ROW_MULTIPLE, Group


class QuantizedLinear(NamedTuple):
    """A quantized matrix in packed row order.

    `codes [K, N]` uint8, `qs [K / 32, N]` uint8 scale index 1..16 and `qscale_max [K / 32]` float16 by group, both one
    beyond the last group, `perm [K]` with packed row `i` being original row `perm[i]`, `groups` the cut, `weight
    [K, N]` float16: the dequantized matrix in original order.
    """

    codes: jax.Array
    qs: jax.Array
    qscale_max: jax.Array
    perm: jax.Array
    groups: tuple[Group, ...]
    weight: jax.Array


class WalkOptions(NamedTuple):
    """What a walk is made of: the search of a group's scales, and the inner loops. Static under `jit`."""

    search: ScaleSearch = search_scales
    kernels: Kernels = XLA


class _Walk(NamedTuple):
    """State of the walk: scaled errors and codes by row, scales by group. Rows after the last are room for a group."""

    errors: jax.Array
    codes: jax.Array
    qs: jax.Array
    qscale_max: jax.Array


class _Span(NamedTuple):
    """A span: its weights less what they owe to the rows before it, its corner of `u`, where these begin, its index."""

    current: jax.Array
    corner: jax.Array
    origin: jax.Array
    index: jax.Array


def gptq(
    w: jax.Array,
    factor: HessianFactor,
    groups: Sequence[Group],
    kernels: Kernels = XLA,
    search: ScaleSearch = search_scales,
) -> QuantizedLinear:
    """Quantize `w [K, N]` float32 with error feedback through `factor`, cut into `groups` of the permuted rows.

    Each group finds its scales on its current weights, then goes row by row: code, error `(w - q) / U[c, c]`, and
    feedback to the rows after it (EXL2.md section 2, "GPTQ"). Left-looking: a row gathers what it owes to the rows
    before it, `W[i] - U[:i, i]^T E[:i]`, which is the same sum in another order. The groups are data, so one
    compilation per shape serves every setting. `kernels`: inner loops; `search`: how a group finds its scales.
    """
    table = jnp.asarray(group_table(groups, w.shape[0]))
    found = gptq_arrays(w, factor, table, options=WalkOptions(search, kernels))
    return QuantizedLinear(found.codes, found.qs, found.qscale_max, factor.perm, tuple(groups), found.weight)


class QuantizedArrays(NamedTuple):
    """The arrays of a `QuantizedLinear` that the walk finds."""

    codes: jax.Array
    qs: jax.Array
    qscale_max: jax.Array
    weight: jax.Array


@partial(jax.jit, static_argnames="options")
def gptq_arrays(w: jax.Array, factor: HessianFactor, table: jax.Array, *, options: WalkOptions) -> QuantizedArrays:
    """`gptq` with the groups as a `group_table`: one program for a shape of matrix."""
    groups, rows = GroupTable.of(table), w.shape[0]
    walk = _walk(w[factor.perm], factor.u, groups, groups.bits[:, None], options, _Shape.any_groups(rows))
    codes = walk.codes[:rows]
    weight = dequantized_weight(codes, walk.qs, walk.qscale_max, factor.inv_perm, table)
    return QuantizedArrays(codes, walk.qs, walk.qscale_max, weight)


@partial(jax.jit, static_argnames=("cuts", "kernels", "search"))
def gptq_tile_losses(
    w: jax.Array,
    factor: HessianFactor,
    cuts: tuple[tuple[Group, ...], ...],
    column_weight: jax.Array,
    kernels: Kernels = XLA,
    search: ScaleSearch = search_scales,
) -> jax.Array:
    """What `gptq` of `w [K, N]` would cost under each of several cuts, tile by tile: `[cuts, K / 32]` float32.

    The sum over tiles of 32 permuted rows is about `sum_n c_n (E^T H E)_nn` for the weight error `E` and
    `column_weight` `c [N]`. The walk's scaled errors give it without a product. They make `E = U^T e`, and
    `U (H + l I) U^T = I`, so that `E^T H E = e^T (I - l U U^T) e`; the errors of rows are rounded apart and
    uncorrelated, which leaves `sum_r e_r^2 (1 - l |U_r|^2)`: what rounding row `r` costs with all that later rows did
    to make up for it, never less than nothing however large the damping. A row's share depends little on how the rows
    before it were rounded, so the tiles of runs at single widths price any mixture of those widths.
    """
    ordered, options = w[factor.perm].astype(jnp.float32), WalkOptions(search, kernels)
    tables = np.stack([group_table(cut, w.shape[0]) for cut in cuts])
    if not kernels.wide:
        return lax.map(partial(_losses_of_cut, ordered, factor, column_weight, options), jnp.asarray(tables))
    places: dict[tuple[int, ...], list[int]] = {}
    for i, cut in enumerate(cuts):
        places.setdefault(tuple(group.rows for group in cut), []).append(i)
    losses = [_losses_beside(ordered, factor, column_weight, options, tables[at]) for at in places.values()]
    order = np.argsort([i for at in places.values() for i in at])
    return jnp.concatenate(losses)[order]


def _losses_of_cut(
    ordered: jax.Array, factor: HessianFactor, column_weight: jax.Array, options: WalkOptions, table: jax.Array
) -> jax.Array:
    groups = GroupTable.of(table)
    walk = _walk(ordered, factor.u, groups, groups.bits[:, None], options, _Shape.any_groups(len(ordered)))
    return walk_tile_losses(walk.errors[: len(ordered)], factor.u, factor.damping, column_weight[None])[0]


def _losses_beside(
    ordered: jax.Array, factor: HessianFactor, column_weight: jax.Array, options: WalkOptions, tables: np.ndarray
) -> jax.Array:
    """The losses `[cuts, K / 32]` of cuts that differ in their widths only, from one walk with all side by side."""
    groups, bits = GroupTable.of(jnp.asarray(tables[0])), jnp.asarray(tables[:, 2].T)
    walk = _walk(ordered, factor.u, groups, bits, options, _Shape.of(tables[0]))
    weights = jnp.broadcast_to(column_weight, (len(tables), len(column_weight)))
    return walk_tile_losses(walk.errors[: len(ordered)], factor.u, factor.damping, weights)


def round_to_nearest(
    w: jax.Array,
    perm: jax.Array,
    groups: Sequence[Group],
    kernels: Kernels = XLA,
    search: ScaleSearch = search_scales,
) -> QuantizedLinear:
    """Quantize `w [K, N]` without feedback, scales as `gptq` finds them; for heads too large for a Hessian."""
    return gptq(w, HessianFactor.identity(perm), groups, kernels, search)


class _Shape(NamedTuple):
    """What is static of the groups of a walk: their most rows; their own rows, the number of spans and of groups in a
    span where these are the same throughout and known, else None.
    """  # noqa: D205

    size: int
    rows: int | None = None
    spans: int | None = None
    groups: int | None = None

    @classmethod
    def any_groups(cls, rows: int) -> "_Shape":
        """Of any groups of a matrix of `rows` rows."""
        return cls(min(LARGEST_GROUP, rows))

    @classmethod
    def of(cls, table: np.ndarray) -> "_Shape":
        """Of the groups of a table that is known."""
        known = GroupTable(*table)
        sizes, counts = (set(x[x > 0].tolist()) for x in (known.rows, known.span_groups))
        return cls(
            size=max(sizes),
            rows=max(sizes) if len(sizes) == 1 else None,
            spans=int((known.span_groups > 0).sum()),
            groups=max(counts) if len(counts) == 1 else None,
        )


def _walk(
    w: jax.Array, u: jax.Array, groups: GroupTable, bits: jax.Array, options: WalkOptions, shape: _Shape
) -> _Walk:
    """Walk the permuted weights `w [K, N]` from the first group to the last.

    `bits [K / 32, copies]` are the widths of each group; copies of the matrix go side by side as columns. Groups go in
    spans: what a span owes to the rows before it is one sum over past panels, and only what its groups owe each other
    is gathered group by group.
    """
    rows, columns = w.shape[0], w.shape[1] * bits.shape[1]
    span, tiles, room = span_rows(rows), rows // ROW_MULTIPLE, rows + shape.size - ROW_MULTIPLE
    maxima = (tiles,) if bits.shape[1] == 1 else (tiles, bits.shape[1])

    def one(i: jax.Array, walk: _Walk) -> _Walk:
        a = groups.span_start[i]
        origin = jnp.minimum(a, rows - span)
        current = jnp.tile(lax.dynamic_slice_in_dim(w, origin, span, 0), (1, bits.shape[1]))
        current = current - _debt(walk.errors, u, (origin, a, span), options)
        corner = lax.dynamic_slice(u, (origin, origin), (span, span))
        return _walk_span(walk, _Span(current, corner, origin, i), groups, bits, options, shape)

    start = _Walk(
        jnp.zeros((room, columns), jnp.float32),
        jnp.zeros((room, columns), jnp.uint8),
        jnp.ones((tiles, columns), jnp.uint8),
        jnp.ones(maxima, jnp.float16),
    )
    return lax.fori_loop(0, groups.spans if shape.spans is None else shape.spans, one, start)


def _debt(errors: jax.Array, u: jax.Array, place: tuple[jax.Array, jax.Array, int], options: WalkOptions) -> jax.Array:
    """What `span` rows from `origin` owe to the rows before `a`: `U[:a, rows]^T E[:a]`, panel by panel."""
    origin, a, span = place
    rows = u.shape[0]
    panel = min(options.kernels.panel, rows)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        # Rows from `a` on have zero errors; a last panel that would overhang skips what the one before it added.
        first = jnp.minimum(i * panel, rows - panel)
        part = lax.dynamic_slice_in_dim(errors, first, panel, 0)
        toward = lax.dynamic_slice(u, (first, origin), (panel, span))
        fresh = jnp.where(first + jnp.arange(panel)[:, None] >= i * panel, toward, 0.0)
        return total + jnp.matmul(fresh.T, part, precision=lax.Precision.HIGHEST)

    return lax.fori_loop(0, (a + panel - 1) // panel, add, jnp.zeros((span, errors.shape[1]), jnp.float32))


def _walk_span(
    walk: _Walk, span: _Span, groups: GroupTable, bits: jax.Array, options: WalkOptions, shape: _Shape
) -> _Walk:
    """Walk the groups of a span, each in `shape.size` rows, those beyond its own zero."""
    size, copies = shape.size, bits.shape[1]
    more, kernels = size - ROW_MULTIPLE, options.kernels
    current, corner = jnp.pad(span.current, ((0, more), (0, 0))), jnp.pad(span.corner, ((0, more), (0, more)))

    def group(i: jax.Array, walk: _Walk) -> _Walk:
        g = groups.span_first[span.index] + i
        row, rows, width = groups.start[g], groups.rows[g], bits[g].astype(jnp.float32)
        width = width[0] if copies == 1 else jnp.repeat(width, current.shape[1] // copies)
        at, own = row - span.origin, jnp.arange(size) < rows
        owed = _owed(
            walk.errors, corner, span, (groups.span_start[span.index], row, rows), size, branch=not kernels.wide
        )
        mine = jnp.where(own[:, None], lax.dynamic_slice_in_dim(current, at, size, 0) - owed, 0.0)
        u = lax.dynamic_slice(corner, (at, at), (size, size))
        importance = jnp.where(own, 1 / jnp.square(jnp.diagonal(u)), 0.0)
        counted = rows if shape.rows is None else None
        choice = options.search(mine, width, importance, kernels, counted, copies)
        errors, codes = kernels.walk_group(mine, u, choice.scale, width, counted)
        return _Walk(
            lax.dynamic_update_slice_in_dim(walk.errors, errors, row, 0),
            lax.dynamic_update_slice_in_dim(walk.codes, codes, row, 0),
            lax.dynamic_update_index_in_dim(walk.qs, choice.qs, g, 0),
            lax.dynamic_update_index_in_dim(walk.qscale_max, choice.qscale_max, g, 0),
        )

    return lax.fori_loop(0, groups.span_groups[span.index] if shape.groups is None else shape.groups, group, walk)


def _owed(
    errors: jax.Array,
    corner: jax.Array,
    span: _Span,
    place: tuple[jax.Array, jax.Array, jax.Array],
    size: int,
    *,
    branch: bool,
) -> jax.Array:
    """What the group of `rows` rows at `row` owes to the groups of its span, which begins at `a`: `[size, N]`.

    Rows beyond the group's own are anything. Where steps may `branch`, no product is larger than the group.
    """
    a, row, rows = place
    length, columns = span.current.shape

    def nothing() -> jax.Array:
        return jnp.zeros((size, columns), jnp.float32)

    def product(taken: int) -> jax.Array:
        past = lax.dynamic_slice_in_dim(errors, span.origin, length, 0)
        past = jnp.where((span.origin + jnp.arange(length) >= a)[:, None], past, 0.0)
        toward = lax.dynamic_slice(corner, (0, row - span.origin), (length, taken))
        owed = jnp.matmul(toward.T, past, precision=lax.Precision.HIGHEST)
        return jnp.pad(owed, ((0, size - taken), (0, 0)))

    if not branch:
        return product(size)
    sizes = range(ROW_MULTIPLE, size + 1, ROW_MULTIPLE)
    branches = [nothing, *(partial(product, taken) for taken in sizes)]
    return lax.switch(jnp.where(row > a, rows // ROW_MULTIPLE, 0), branches)


@jax.jit
def walk_tile_losses(errors: jax.Array, u: jax.Array, damping: jax.Array, column_weight: jax.Array) -> jax.Array:
    """The losses of `gptq_tile_losses` from the scaled errors of a walk with feedback through `u [K, K]`.

    `errors [K, M * N]` of `M` matrices side by side and `column_weight [M, N]` give `[M, K / 32]`.
    """
    undamped = jnp.maximum(1 - damping * jnp.sum(jnp.square(u), axis=1), 0.0)
    squares = jnp.square(errors).reshape(len(errors), *column_weight.shape)
    rows = jnp.einsum("kmn,mn->mk", squares, column_weight, precision=lax.Precision.HIGHEST) * undamped
    return jnp.sum(rows.reshape(len(column_weight), -1, ROW_MULTIPLE), axis=2)


@jax.jit
def dequantized_weight(
    codes: jax.Array, qs: jax.Array, qscale_max: jax.Array, inv_perm: jax.Array, table: jax.Array
) -> jax.Array:
    """The weight `[K, N]` float16 in original order of the arrays of a `QuantizedLinear` and its `group_table`."""
    groups = GroupTable.of(table)
    scale = half_scale(qscale_max[groups.tile_group][:, None], qs[groups.tile_group])
    tiles = codes.reshape(-1, ROW_MULTIPLE, codes.shape[1])
    weight = dequantize(tiles, scale[:, None, :], groups.tile_bits[:, None, None])
    return weight.astype(jnp.float16).reshape(codes.shape)[inv_perm]
