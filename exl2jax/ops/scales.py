"""Scale searches of a group: one 4-bit index per column and one maximum per group."""

from functools import reduce
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.ops.groups import TOP, Begin
from exl2jax.ops.kernels import XLA, Kernels
from exl2jax.ops.rounding import HALF_MAX, half_scale
from exl2jax.ops.scale_losses import MAX_INDEX, MULTIPLIERS, OFFSETS, by_column

GRID = np.asarray([0.70 * (1 - i / 96) + 1.20 * i / 96 for i in range(97)], np.float32)
"""Multipliers that stock tries for `q_scale_max`."""


class ScaleChoice(NamedTuple):
    """Scales of one group: `qs [N]` index 1..16, `qscale_max []` as exact half, `scale [N]` the working scale.

    Of matrices side by side `qscale_max` and `multiplier` are `[matrices]`.
    """

    qs: jax.Array
    qscale_max: jax.Array
    scale: jax.Array
    multiplier: jax.Array


class GroupContext(NamedTuple):
    """The place of a group in the walk, which its scale search may use; by default a group of one matrix by itself.

    `importance [K]` is the walk's `1 / U_rr^2` (None: ones), in which the group begins at row `begin.row`. Only the
    first `rows` (traced, a multiple of 32; None: all) belong to the group; the others are zero. The columns are those
    of `matrices` of equal width, each of which has a maximum of its own.
    """

    importance: jax.Array | None = None
    kernels: Kernels = XLA
    rows: jax.Array | None = None
    matrices: int = 1
    begin: Begin = TOP


ALONE = GroupContext()


class ScaleSearch(Protocol):
    """A scale search of the walk; hashable, so that it can be static under `jit`."""

    def __call__(self, w: jax.Array, bits: jax.Array, context: GroupContext = ALONE) -> ScaleChoice:
        """Choose the scales of the group `w [size, N]` float32 at the width `bits`, one for all columns or `[N]`."""
        ...


def search_scales(w: jax.Array, bits: jax.Array, context: GroupContext = ALONE) -> ScaleChoice:
    """Choose the scales of a group as stock does (`ScaleSearch`).

    Minimises `sum |clamp(rint(w / (s p))) s p - w|^3.5` over the 97 multipliers `p`, the same for every column of the
    group; the rows' `importance` is not used. docs/format.md 2.6. In units of a column's
    base scale `s` its loss is `s^3.5 sum |clamp(rint(x / p)) p - x|^3.5`, and `s^3.5` is `(qs / 16)^7` times a
    constant.
    """
    codes = jnp.exp2(bits.astype(jnp.float32))
    base, smax = _base_scales(w, codes, context.matrices)
    widest = by_column(smax, len(base))
    qs = jnp.clip(jnp.round(jnp.sqrt(base / widest) * MAX_INDEX), 1, MAX_INDEX)
    steps = w / (jnp.square(qs / MAX_INDEX) * widest)
    losses = context.kernels.scale_losses(steps, jnp.asarray(GRID)[:, None], codes, None, context.rows)
    losses, weights = (x.reshape(*x.shape[:-1], context.matrices, -1) for x in (losses, (qs / MAX_INDEX) ** 7))
    total = jnp.einsum("pmn,mn->pm", losses, weights, precision=lax.Precision.HIGHEST)
    return _choice(qs, smax, jnp.asarray(GRID)[jnp.argmin(total, axis=0)])


def search_columns(w: jax.Array, bits: jax.Array, context: GroupContext = ALONE) -> ScaleChoice:
    """Choose the scales of a group by least squared error, an index for every column (`ScaleSearch`).

    Minimises `sum_rn importance_r (clamp(rint(w / s)) s - w)^2` with `s = (qs / 16)^2 p smax` over the multipliers `p`
    of the group and the index `qs` of each column within `OFFSETS`. With the `importance` of the walk this is the share
    of the group in GPTQ's loss. Stock scales all columns by one multiplier; the format allows an index for each.
    """
    importance = jnp.ones(len(w), jnp.float32) if context.importance is None else context.importance
    codes = jnp.exp2(bits.astype(jnp.float32))
    base, smax = _base_scales(w, codes, context.matrices)
    least, own = context.kernels.index_losses(w, base, smax, codes, importance, context.begin, context.rows)
    total = jnp.sum(least.reshape(len(MULTIPLIERS), context.matrices, -1), axis=2)
    qs, multiplier = _least(total, own)
    return _choice(qs, smax, multiplier)


@jax.jit
def _least(total: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each matrix the multiplier of least `total [multipliers, matrices]`, the first of equals, and the indices
    `own [multipliers, N]` of its columns there. Comparisons fuse into what uses them; an argmin and a gather would not.
    """  # noqa: D205
    totals, indices = jnp.unstack(total), jnp.unstack(own)
    multiplier, qs = jnp.zeros_like(totals[0]), jnp.zeros_like(indices[0])
    for p, mine in enumerate(totals):
        beats = (mine < other if q < p else mine <= other for q, other in enumerate(totals) if q != p)
        best = reduce(jnp.logical_and, beats)
        multiplier = jnp.where(best, MULTIPLIERS[p], multiplier)
        qs = jnp.where(by_column(best, len(qs)), indices[p], qs)
    return qs, multiplier


TRIALS: dict[ScaleSearch, int] = {search_scales: len(GRID), search_columns: len(MULTIPLIERS) * len(OFFSETS)}
"""How many scales a search tries on every weight: what it costs."""


def _base_scales(w: jax.Array, codes: jax.Array, matrices: int) -> tuple[jax.Array, jax.Array]:
    """The scale `[N]` at which the widest weight of each column is the widest level, and the largest `[matrices]`."""
    base = (jnp.max(jnp.abs(w), axis=0) + 1e-12) / ((codes - 1) / 2)
    return base, jnp.max(base.reshape(matrices, -1), axis=1)


def _choice(qs: jax.Array, smax: jax.Array, multiplier: jax.Array) -> ScaleChoice:
    """The choice as it is stored; `smax` and `multiplier [matrices]`."""
    matrices, columns = len(multiplier), len(qs)
    qscale_max = jnp.minimum(smax * multiplier, HALF_MAX).astype(jnp.float16)
    scale = half_scale(by_column(qscale_max, columns), qs)
    if matrices == 1:
        qscale_max, multiplier = qscale_max[0], multiplier[0]
    return ScaleChoice(qs.astype(jnp.uint8), qscale_max, scale, multiplier)
