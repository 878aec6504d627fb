"""GPTQ of a whole matrix with mixed bit widths and group sizes, and plain rounding to nearest."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.ops.columns import ColumnFeedback, walk_columns
from exl2jax.ops.groups import LARGEST_GROUP, GroupTable, group_table, span_rows
from exl2jax.ops.hessian import HessianFactor
from exl2jax.ops.kernels import XLA, Kernels
from exl2jax.ops.rounding import dequantize, half_scale
from exl2jax.ops.scale_losses import by_column
from exl2jax.ops.scales import GroupContext, ScaleSearch, search_scales
from exl2jax.qparams import ROW_MULTIPLE, Group

_PANEL = 256
"""Rows of past errors that one product of the feedback takes up where groups go in spans."""


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
    """The parts of a walk: the search of a group's scales, and the inner loops. Static under `jit`."""

    search: ScaleSearch = search_scales
    kernels: Kernels = XLA


class _Walk(NamedTuple):
    """State of the walk: scaled errors and codes by row, scales by group. Rows after the last are room for a group."""

    errors: jax.Array
    codes: jax.Array
    qs: jax.Array
    qscale_max: jax.Array


class _Plan(NamedTuple):
    """The plan of a walk: its groups, the width of each, its options, and what is static of the groups.

    `widths [K / 32 or 1, 1 or columns]` are the bits of every group, or of all; `copies` of the matrix go side by side
    as columns. `size` is the most rows of a group; `rows` are those of each and `number` is how many there
    are, where known. `toward` feeds errors to later columns (`ColumnFeedback`).
    """

    groups: GroupTable
    widths: jax.Array
    options: WalkOptions
    size: int
    copies: int = 1
    rows: int | None = None
    number: int | None = None
    toward: jax.Array | None = None

    @classmethod
    def of(cls, table: jax.Array, options: WalkOptions, toward: jax.Array | None = None) -> "_Plan":
        """Of any groups."""
        groups = GroupTable.of(table)
        size = min(LARGEST_GROUP, ROW_MULTIPLE * len(groups.rows))
        return cls(groups, groups.bits[:, None].astype(jnp.float32), options, size, toward=toward)

    @classmethod
    def beside(cls, cuts: Sequence[Sequence[Group]], rows: int, columns: int, options: WalkOptions) -> "_Plan":
        """Of a matrix `[rows, columns]` cut in several ways that differ in their widths only."""
        tables = np.stack([group_table(cut, rows) for cut in cuts])
        bits, sizes = tables[:, 2, : len(cuts[0])].T.astype(np.float32), {group.rows for group in cuts[0]}
        if (bits == bits[0]).all():
            bits = bits[:1]  # nothing to look up group by group
        widths = by_column(jnp.asarray(bits), len(cuts) * columns)
        known = max(sizes) if len(sizes) == 1 else None
        return cls(GroupTable.of(jnp.asarray(tables[0])), widths, options, max(sizes), len(cuts), known, len(cuts[0]))


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
def gptq_arrays(
    w: jax.Array,
    factor: HessianFactor,
    table: jax.Array,
    columns: ColumnFeedback | None = None,
    *,
    options: WalkOptions,
) -> QuantizedArrays:
    """`gptq` with the groups as a `group_table`: one program for a shape of matrix.

    With feedback between `columns` too, if given.
    """
    ordered = w[factor.perm]
    if columns is None:
        walk = _walk(ordered, factor.u, _Plan.of(table, options))
        codes, qs = walk.codes[: len(w)], walk.qs
    else:
        walk = _walk(ordered[:, columns.perm], factor.u, _Plan.of(table, options, columns.toward))
        back = jnp.argsort(columns.perm)
        codes, qs = walk.codes[: len(w)][:, back], walk.qs[:, back]
    weight = dequantized_weight(codes, qs, walk.qscale_max, factor.inv_perm, table)
    return QuantizedArrays(codes, qs, walk.qscale_max, weight)


@partial(jax.jit, static_argnames=("cuts", "kernels", "search"))
def gptq_tile_losses(
    w: jax.Array,
    factor: HessianFactor,
    cuts: tuple[tuple[Group, ...], ...],
    column_weight: jax.Array,
    kernels: Kernels = XLA,
    search: ScaleSearch = search_scales,
) -> jax.Array:
    """The cost of `gptq` of `w [K, N]` under each of several cuts, tile by tile: `[cuts, K / 32]` float32.

    The sum over tiles of 32 permuted rows is about `sum_n c_n (E^T H E)_nn` for the weight error `E` and
    `column_weight` `c [N]`. The walk's scaled errors give it without a product. They make `E = U^T e`, and
    `U (H + l I) U^T = I`, so that `E^T H E = e^T (I - l U U^T) e`; the errors of rows are rounded apart and
    uncorrelated, which leaves `sum_r e_r^2 (1 - l |U_r|^2)`: what rounding row `r` costs with all that later rows did
    to make up for it, never less than nothing however large the damping. A row's share depends little on how the rows
    before it were rounded, so the tiles of runs at single widths price any mixture of those widths.
    """
    rows, columns = w.shape
    ordered, options = w[factor.perm].astype(jnp.float32), WalkOptions(search, kernels)

    def losses(plan: _Plan) -> jax.Array:
        errors = _walk(ordered, factor.u, plan).errors[:rows]
        weights = jnp.broadcast_to(column_weight, (plan.copies, columns))
        return walk_tile_losses(errors, factor.u, factor.damping, weights)

    if not kernels.wide:
        tables = jnp.asarray(np.stack([group_table(cut, rows) for cut in cuts]))
        return lax.map(lambda table: losses(_Plan.of(table, options))[0], tables)
    places: dict[tuple[int, ...], list[int]] = {}
    for i, cut in enumerate(cuts):
        places.setdefault(tuple(group.rows for group in cut), []).append(i)
    found = [losses(_Plan.beside([cuts[i] for i in at], rows, columns, options)) for at in places.values()]
    return jnp.concatenate(found)[np.argsort([i for at in places.values() for i in at])]


def round_to_nearest(
    w: jax.Array,
    perm: jax.Array,
    groups: Sequence[Group],
    kernels: Kernels = XLA,
    search: ScaleSearch = search_scales,
) -> QuantizedLinear:
    """Quantize `w [K, N]` without feedback, scales as `gptq` finds them; for heads too large for a Hessian."""
    return gptq(w, HessianFactor.identity(perm), groups, kernels, search)


def _walk(w: jax.Array, u: jax.Array, plan: _Plan) -> _Walk:
    """Walk the permuted weights `w [K, N]` from the first group to the last."""
    columns, tiles, room = w.shape[1] * plan.copies, len(w) // ROW_MULTIPLE, len(w) + plan.size - ROW_MULTIPLE
    start = _Walk(
        jnp.zeros((room, columns), jnp.float32),
        jnp.zeros((room, columns), jnp.uint8),
        jnp.ones((tiles, columns), jnp.uint8),
        jnp.ones((tiles,) if plan.copies == 1 else (tiles, plan.copies), jnp.float16),
    )
    return (_walk_wide if plan.options.kernels.wide else _walk_in_spans)(start, w, u, plan)


def _walk_wide(walk: _Walk, w: jax.Array, u: jax.Array, plan: _Plan) -> _Walk:
    """Group by group, each with one product for all it owes: half of it with rows that have no errors yet, all in few
    launches.
    """  # noqa: D205
    rows, size = len(w), plan.size
    extra = 0 if plan.rows == size and rows % size == 0 else size - ROW_MULTIPLE
    w, u = jnp.pad(w, ((0, extra), (0, 0))), jnp.pad(u, ((0, extra), (0, extra)))
    importance = 1 / jnp.square(jnp.diagonal(u))
    toward = -u[:rows].T  # so that a group's rows lie together, and the difference is one product added

    def group(g: jax.Array, state: tuple[_Walk, jax.Array]) -> tuple[_Walk, jax.Array]:
        walk, tile = state
        row = tile * ROW_MULTIPLE
        own = jnp.tile(lax.dynamic_slice_in_dim(w, row, size, 0), (1, plan.copies))
        past = lax.dynamic_slice_in_dim(toward, row, size, 0)
        mine = own + jnp.matmul(past, walk.errors[:rows], precision=lax.Precision.HIGHEST)
        walk = _walk_group(walk, mine, (u, importance, tile), (g, row), plan)
        return walk, tile + (plan.groups.rows[g] if plan.rows is None else plan.rows) // ROW_MULTIPLE

    count = plan.groups.number if plan.number is None else plan.number
    return lax.fori_loop(0, count, group, (walk, jnp.int32(0)))[0]


def _walk_in_spans(walk: _Walk, w: jax.Array, u: jax.Array, plan: _Plan) -> _Walk:
    """Groups in spans: what a span owes to the rows before it is one sum over past panels, and only what its groups
    owe each other is gathered group by group.
    """  # noqa: D205
    rows, span, more, groups = len(w), span_rows(len(w)), plan.size - ROW_MULTIPLE, plan.groups

    def one(i: jax.Array, walk: _Walk) -> _Walk:
        a = groups.span_start[i]
        origin = jnp.minimum(a, rows - span)
        current = lax.dynamic_slice_in_dim(w, origin, span, 0) - _debt(walk.errors, u, origin, a, span)
        current = jnp.pad(current, ((0, more), (0, 0)))
        corner = jnp.pad(lax.dynamic_slice(u, (origin, origin), (span, span)), ((0, more), (0, more)))
        importance = 1 / jnp.square(jnp.diagonal(corner))

        def group(j: jax.Array, walk: _Walk) -> _Walk:
            g = groups.span_first[i] + j
            row, at = groups.start[g], groups.start[g] - origin
            owed = _owed(walk.errors, corner, (origin, a, row, groups.rows[g]), span, plan.size)
            mine = lax.dynamic_slice_in_dim(current, at, plan.size, 0) - owed
            return _walk_group(walk, mine, (corner, importance, at // ROW_MULTIPLE), (g, row), plan)

        return lax.fori_loop(0, groups.span_groups[i], group, walk)

    return lax.fori_loop(0, groups.spans, one, walk)


def _walk_group(
    walk: _Walk,
    mine: jax.Array,
    feedback: tuple[jax.Array, jax.Array, jax.Array],
    place: tuple[jax.Array, jax.Array],
    plan: _Plan,
) -> _Walk:
    """Walk a group, its current weights the first rows of `mine`, with its index and first row `place = (g, row)`.

    `feedback` is `u`, the importance of its rows, and the tile of 32 rows where the group begins there.
    """
    (u, importance, tile), (g, row), kernels = feedback, place, plan.options.kernels
    width = plan.widths[g if len(plan.widths) > 1 else 0]
    width = width if plan.copies > 1 else width[0]
    counted = plan.groups.rows[g] if plan.rows is None else None
    if counted is not None:
        mine = jnp.where((jnp.arange(plan.size) < counted)[:, None], mine, 0.0)
    choice = plan.options.search(mine, width, GroupContext(importance, kernels, counted, plan.copies, tile))
    inputs = (mine, u, tile, choice.scale, width, counted)
    walked = kernels.walk_group if plan.toward is None else partial(walk_columns, kernels.walk_group, plan.toward)
    errors, codes = walked(*inputs)
    return _Walk(
        lax.dynamic_update_slice_in_dim(walk.errors, errors, row, 0),
        lax.dynamic_update_slice_in_dim(walk.codes, codes, row, 0),
        lax.dynamic_update_index_in_dim(walk.qs, choice.qs, g, 0),
        lax.dynamic_update_index_in_dim(walk.qscale_max, choice.qscale_max, g, 0),
    )


def _debt(errors: jax.Array, u: jax.Array, origin: jax.Array, a: jax.Array, span: int) -> jax.Array:
    """The feedback to `span` rows from `origin` of the rows before `a`: `U[:a, rows]^T E[:a]`, panel by panel."""
    rows, panel = len(u), min(_PANEL, len(u))

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        # Rows from `a` on have zero errors; a last panel that would overhang skips what the one before it added.
        first = jnp.minimum(i * panel, rows - panel)
        part = lax.dynamic_slice_in_dim(errors, first, panel, 0)
        toward = lax.dynamic_slice(u, (first, origin), (panel, span))
        fresh = jnp.where(first + jnp.arange(panel)[:, None] >= i * panel, toward, 0.0)
        return total + jnp.matmul(fresh.T, part, precision=lax.Precision.HIGHEST)

    return lax.fori_loop(0, (a + panel - 1) // panel, add, jnp.zeros((span, errors.shape[1]), jnp.float32))


def _owed(
    errors: jax.Array,
    corner: jax.Array,
    place: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    span: int,
    size: int,
) -> jax.Array:
    """The feedback to the group of `rows` rows at `row` of those from row `a`, where its span begins: `[size, N]`.

    `place = (origin, a, row, rows)`; `corner` begins at row `origin`. Rows beyond the group's own are anything.
    """
    origin, a, row, rows = place

    def nothing() -> jax.Array:
        return jnp.zeros((size, errors.shape[1]), jnp.float32)

    def product(taken: int) -> jax.Array:
        past = lax.dynamic_slice_in_dim(errors, origin, span, 0)
        past = jnp.where((origin + jnp.arange(span) >= a)[:, None], past, 0.0)
        toward = lax.dynamic_slice(corner, (0, row - origin), (span, taken))
        owed = jnp.matmul(toward.T, past, precision=lax.Precision.HIGHEST)
        return jnp.pad(owed, ((0, size - taken), (0, 0)))

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
