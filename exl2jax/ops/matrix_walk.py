"""The walk over all groups of a matrix: how errors of rows reach the groups after them.

On a CPU groups go in spans, which are short, since a core does little work that can be left out. On a GPU they go in
panels, in few launches.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.ops.columns import walk_columns
from exl2jax.ops.groups import LARGEST_GROUP, Begin, GroupTable, group_table, span_rows
from exl2jax.ops.kernels import XLA, Kernels
from exl2jax.ops.scale_losses import by_column
from exl2jax.ops.scales import GroupContext, ScaleSearch, search_scales
from exl2jax.qparams import ROW_MULTIPLE, Group

_ERRORS = 256
"""Rows of past errors that one product of the feedback takes up where groups go in spans."""


class WalkOptions(NamedTuple):
    """The parts of a walk: the search of a group's scales, and the inner loops. Static under `jit`."""

    search: ScaleSearch = search_scales
    kernels: Kernels = XLA


class Walk(NamedTuple):
    """State of a walk: scaled errors and codes by row, scales by group. Rows after the last are room for a group."""

    errors: jax.Array
    codes: jax.Array
    qs: jax.Array
    qscale_max: jax.Array


class Plan(NamedTuple):
    """The plan of a walk: its groups, the width of each, its options, and what is static of the groups.

    `widths [K / 32 or 1, 1 or columns]` are the bits of every group, or of all; `copies` of the matrix go side by side
    as columns. `size` is the most rows of a group; `rows` are those of each, where they are known to be alike.
    `toward` feeds errors to later columns (`ColumnFeedback`).
    """

    groups: GroupTable
    widths: jax.Array
    options: WalkOptions
    size: int
    copies: int = 1
    rows: int | None = None
    toward: jax.Array | None = None

    @classmethod
    def of(cls, table: jax.Array, options: WalkOptions, toward: jax.Array | None = None) -> "Plan":
        """Of any groups."""
        groups = GroupTable.of(table)
        size = min(LARGEST_GROUP, ROW_MULTIPLE * len(groups.rows))
        return cls(groups, groups.bits[:, None].astype(jnp.float32), options, size, toward=toward)

    @classmethod
    def beside(cls, cuts: Sequence[Sequence[Group]], rows: int, columns: int, options: WalkOptions) -> "Plan":
        """Of a matrix `[rows, columns]` cut in several ways that differ in their widths only."""
        tables = np.stack([group_table(cut, rows) for cut in cuts])
        bits, sizes = tables[:, 2, : len(cuts[0])].T.astype(np.float32), {group.rows for group in cuts[0]}
        if (bits == bits[0]).all():
            bits = bits[:1]  # nothing to look up group by group
        widths = by_column(jnp.asarray(bits), len(cuts) * columns)
        known = max(sizes) if len(sizes) == 1 else None
        return cls(GroupTable.of(jnp.asarray(tables[0])), widths, options, max(sizes), len(cuts), known)


def walk_matrix(w: jax.Array, u: jax.Array, plan: Plan) -> Walk:
    """Walk the permuted weights `w [K, N]` from the first group to the last, with feedback through `u [K, K]`."""
    return (_walk_in_panels if plan.options.kernels.panel else _walk_in_spans)(w, u, plan)


def _start(rows: int, columns: int, copies: int) -> Walk:
    """A walk of `rows` rows, its room included, that has not begun."""
    return Walk(
        jnp.zeros((rows, columns), jnp.float32),
        jnp.zeros((rows, columns), jnp.uint8),
        jnp.ones((rows // ROW_MULTIPLE, columns), jnp.uint8),
        jnp.ones((rows // ROW_MULTIPLE,) if copies == 1 else (rows // ROW_MULTIPLE, copies), jnp.float16),
    )


class _Panels(NamedTuple):
    """A matrix padded to whole panels of `panel` rows, `panels` of them.

    A group may hang over the end of the panel in which it begins, so that a panel works in a `window` of rows.
    `groups` is how many a panel has, where all are of one size that divides it. `toward = -u^T` has the factors of a
    row lie together, and makes the difference one product that is added.
    """

    w: jax.Array
    u: jax.Array
    toward: jax.Array
    panel: int
    window: int
    panels: int
    groups: int | None

    @classmethod
    def of(cls, w: jax.Array, u: jax.Array, plan: Plan) -> "_Panels":
        """Cut `w [K, N]` with the factor `u [K, K]`."""
        panel = min(plan.options.kernels.panel or len(w), len(w))
        groups = panel // plan.rows if plan.rows is not None and panel % plan.rows == 0 else None
        window = panel + (plan.size - ROW_MULTIPLE if groups is None else 0)
        count = -(-len(w) // panel)
        more = (count - 1) * panel + window - len(w)
        w, u = jnp.pad(w, ((0, more), (0, 0))), jnp.pad(u, ((0, more), (0, more)))
        return cls(w, u, -u.T, panel, window, count, groups)

    def window_of(self, p: jax.Array, errors: jax.Array, copies: int) -> "_Window":
        """The window of panel `p`, the errors of all panels before it taken up."""
        first = p * self.panel

        def take_up(before: jax.Array, current: jax.Array) -> jax.Array:
            past = lax.dynamic_slice_in_dim(errors, before * self.panel, self.panel, 0)
            toward = lax.dynamic_slice(self.toward, (first, before * self.panel), (self.window, self.panel))
            return current + jnp.matmul(toward, past, precision=lax.Precision.HIGHEST)

        own = jnp.tile(lax.dynamic_slice_in_dim(self.w, first, self.window, 0), (1, copies))
        toward, corner = (lax.dynamic_slice(x, (first, first), (self.window,) * 2) for x in (self.toward, self.u))
        importance = 1 / jnp.square(jnp.diagonal(corner))
        return _Window(first, lax.fori_loop(0, p, take_up, own), toward, corner, importance)


class _Window(NamedTuple):
    """The rows that a panel works in: its first row in the matrix, and of these rows alone the weights, the factors
    towards them, the factor, and their importance.
    """  # noqa: D205

    first: jax.Array
    current: jax.Array
    toward: jax.Array
    corner: jax.Array
    importance: jax.Array


class _At(NamedTuple):
    """How far a walk in panels has come: its next group, and the `steps` of the `Begin` of this in the panel."""

    walk: Walk
    steps: jax.Array
    group: jax.Array


def _walk_in_panels(w: jax.Array, u: jax.Array, plan: Plan) -> Walk:
    """Panel by panel: each takes up what it owes to those before it in a few large products, and then goes group by
    group, each with one product for what it owes within the panel.
    """  # noqa: D205
    panels = _Panels.of(w, u, plan)

    def one(p: jax.Array, at: _At) -> _At:
        errors, window = at.walk.errors, panels.window_of(p, at.walk.errors, plan.copies)
        recent = lax.dynamic_slice_in_dim(errors, window.first, panels.window, 0)
        inside = at._replace(walk=at.walk._replace(errors=recent))
        group = partial(_next_group, window, plan, plan.size if panels.groups else ROW_MULTIPLE)
        if panels.groups is None:
            end = jnp.minimum(panels.panel, len(w) - window.first)
            done = lax.while_loop(lambda at: at.steps * ROW_MULTIPLE < end, group, inside)
            done = done._replace(steps=done.steps - panels.panel // ROW_MULTIPLE)
        else:
            done = at._replace(walk=_known_groups(panels.groups, p, group, inside.walk))
        errors = lax.dynamic_update_slice_in_dim(errors, done.walk.errors, window.first, 0)
        return done._replace(walk=done.walk._replace(errors=errors))

    start = _start(len(panels.w), w.shape[1] * plan.copies, plan.copies)
    walk = lax.fori_loop(0, panels.panels, one, _At(start, jnp.int32(0), jnp.int32(0))).walk
    return Walk(*(x[: len(w)] for x in walk[:2]), *(x[: len(w) // ROW_MULTIPLE] for x in walk[2:]))


def _known_groups(count: int, p: jax.Array, group: Callable[[_At], _At], walk: Walk) -> Walk:
    """Walk the groups of panel `p`, whose places are known: XLA then slices within the calls that take the slices."""

    def one(j: jax.Array, walk: Walk) -> Walk:
        return group(_At(walk, j, p * count + j)).walk

    return lax.fori_loop(0, count, one, walk)


def _next_group(window: _Window, plan: Plan, step: int, at: _At) -> _At:
    """Walk the next group in the window of a panel, whose errors `at` holds."""
    walk, steps, g = at
    begin = Begin(steps, step)
    row = begin.row
    toward = lax.dynamic_slice_in_dim(window.toward, row, plan.size, 0)
    own = lax.dynamic_slice_in_dim(window.current, row, plan.size, 0)
    mine = own + jnp.matmul(toward, walk.errors, precision=lax.Precision.HIGHEST)
    feedback = (window.corner, window.importance, begin)
    walk = _walk_group(walk, mine, feedback, (g, window.first + row, row), plan)
    return _At(walk, steps + (plan.groups.rows[g] if plan.rows is None else plan.rows) // step, g + 1)


def _walk_in_spans(w: jax.Array, u: jax.Array, plan: Plan) -> Walk:
    """Groups in spans: what a span owes to the rows before it is one sum over past panels, and only what its groups
    owe each other is gathered group by group.
    """  # noqa: D205
    rows, span, more, groups = len(w), span_rows(len(w)), plan.size - ROW_MULTIPLE, plan.groups

    def one(i: jax.Array, walk: Walk) -> Walk:
        a = groups.span_start[i]
        origin = jnp.minimum(a, rows - span)
        current = lax.dynamic_slice_in_dim(w, origin, span, 0) - _debt(walk.errors, u, origin, a, span)
        current = jnp.pad(current, ((0, more), (0, 0)))
        corner = jnp.pad(lax.dynamic_slice(u, (origin, origin), (span, span)), ((0, more), (0, more)))
        importance = 1 / jnp.square(jnp.diagonal(corner))

        def group(j: jax.Array, walk: Walk) -> Walk:
            g = groups.span_first[i] + j
            row, at = groups.start[g], groups.start[g] - origin
            owed = _owed(walk.errors, corner, (origin, a, row, groups.rows[g]), span, plan.size)
            mine = lax.dynamic_slice_in_dim(current, at, plan.size, 0) - owed
            return _walk_group(walk, mine, (corner, importance, Begin(at // ROW_MULTIPLE)), (g, row, row), plan)

        return lax.fori_loop(0, groups.span_groups[i], group, walk)

    walk = _start(rows, w.shape[1] * plan.copies, plan.copies)
    errors, codes = (jnp.pad(x, ((0, more), (0, 0))) for x in walk[:2])
    walk = lax.fori_loop(0, groups.spans, one, walk._replace(errors=errors, codes=codes))
    return walk._replace(errors=walk.errors[:rows], codes=walk.codes[:rows])


def _walk_group(
    walk: Walk,
    mine: jax.Array,
    feedback: tuple[jax.Array, jax.Array, Begin],
    place: tuple[jax.Array, jax.Array, jax.Array],
    plan: Plan,
) -> Walk:
    """Walk a group, its current weights the first rows of `mine`.

    `place = (g, row, at)` is its index, its first row, and the row of `walk.errors` where it begins. `feedback` is `u`,
    the importance of its rows, and where the group begins there.
    """
    (u, importance, begin), (g, row, at), kernels = feedback, place, plan.options.kernels
    width = plan.widths[g if len(plan.widths) > 1 else 0]
    width = width if plan.copies > 1 else width[0]
    counted = plan.groups.rows[g] if plan.rows is None else None
    if counted is not None:
        mine = jnp.where((jnp.arange(plan.size) < counted)[:, None], mine, 0.0)
    choice = plan.options.search(mine, width, GroupContext(importance, kernels, counted, plan.copies, begin))
    inputs = (mine, u, begin, choice.scale, width, counted)
    walked = kernels.walk_group if plan.toward is None else partial(walk_columns, kernels.walk_group, plan.toward)
    errors, codes = walked(*inputs)
    return Walk(
        lax.dynamic_update_slice_in_dim(walk.errors, errors, at, 0),
        lax.dynamic_update_slice_in_dim(walk.codes, codes, row, 0),
        lax.dynamic_update_index_in_dim(walk.qs, choice.qs, g, 0),
        lax.dynamic_update_index_in_dim(walk.qscale_max, choice.qscale_max, g, 0),
    )


def _debt(errors: jax.Array, u: jax.Array, origin: jax.Array, a: jax.Array, span: int) -> jax.Array:
    """The feedback to `span` rows from `origin` of the rows before `a`: `U[:a, rows]^T E[:a]`, panel by panel."""
    rows, panel = len(u), min(_ERRORS, len(u))

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

    past = lax.dynamic_slice_in_dim(errors, origin, span, 0)
    past = jnp.where((origin + jnp.arange(span) >= a)[:, None], past, 0.0)
    toward = lax.dynamic_slice(corner, (0, row - origin), (span, size))

    def nothing() -> jax.Array:
        return jnp.zeros((size, errors.shape[1]), jnp.float32)

    def product(taken: int) -> jax.Array:
        owed = jnp.matmul(toward[:, :taken].T, past, precision=lax.Precision.HIGHEST)
        return jnp.pad(owed, ((0, size - taken), (0, 0)))

    sizes = range(ROW_MULTIPLE, size + 1, ROW_MULTIPLE)
    branches = [nothing, *(partial(product, taken) for taken in sizes)]
    return lax.switch(jnp.where(row > a, rows // ROW_MULTIPLE, 0), branches)
