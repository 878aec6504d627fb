"""GPTQ of a whole matrix with mixed bit widths and group sizes, and plain rounding to nearest."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.ops.columns import ColumnFeedback
from exl2jax.ops.groups import GroupTable, group_table
from exl2jax.ops.hessian import HessianFactor
from exl2jax.ops.kernels import XLA, Kernels
from exl2jax.ops.matrix_walk import Plan, WalkOptions, walk_matrix
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
        walk = walk_matrix(ordered, factor.u, Plan.of(table, options))
        codes, qs = walk.codes, walk.qs
    else:
        walk = walk_matrix(ordered[:, columns.perm], factor.u, Plan.of(table, options, columns.toward))
        back = jnp.argsort(columns.perm)
        codes, qs = walk.codes[:, back], walk.qs[:, back]
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

    def losses(plan: Plan) -> jax.Array:
        errors = walk_matrix(ordered, factor.u, plan).errors
        weights = jnp.broadcast_to(column_weight, (plan.copies, columns))
        return walk_tile_losses(errors, factor.u, factor.damping, weights)

    if not kernels.panel:
        tables = jnp.asarray(np.stack([group_table(cut, rows) for cut in cuts]))
        return lax.map(lambda table: losses(Plan.of(table, options))[0], tables)
    places: dict[tuple[int, ...], list[int]] = {}
    for i, cut in enumerate(cuts):
        places.setdefault(tuple(group.rows for group in cut), []).append(i)
    found = [losses(Plan.beside([cuts[i] for i in at], rows, columns, options)) for at in places.values()]
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
