"""Scale searches of a group: one 4-bit index per column and one maximum per group."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.ops.kernels import XLA, Kernels
from exl2jax.ops.rounding import HALF_MAX, half_scale

GRID = np.asarray([0.70 * (1 - i / 96) + 1.20 * i / 96 for i in range(97)], np.float32)
"""Multipliers that stock tries for `q_scale_max`."""

MULTIPLIERS = np.linspace(0.5, 1.2, 8, dtype=np.float32)
"""Multipliers tried for `q_scale_max` where every column finds its own index, which does the fine work."""

OFFSETS = np.arange(-5, 4, dtype=np.float32)
"""Indices tried for a column, from the one whose scale just holds its widest weight: two bits want half of that scale,
eight bits of few rows at times a little more. All sixteen would lower the loss by a percent, by three or so where
outliers have two bits.
"""

MAX_INDEX = 16


class ScaleChoice(NamedTuple):
    """Scales of one group: `qs [N]` index 1..16, `qscale_max []` as exact half, `scale [N]` the working scale.

    Of matrices side by side `qscale_max` and `multiplier` are `[matrices]`.
    """

    qs: jax.Array
    qscale_max: jax.Array
    scale: jax.Array
    multiplier: jax.Array


class ScaleSearch(Protocol):
    """A scale search of the walk; hashable, so that it can be static under `jit`."""

    def __call__(
        self,
        w: jax.Array,
        bits: jax.Array,
        importance: jax.Array | None = None,
        kernels: Kernels = XLA,
        rows: jax.Array | None = None,
        matrices: int = 1,
    ) -> ScaleChoice:
        """Choose the scales of the group `w [size, N]` float32 at the width `bits`, one for all columns or `[N]`.

        `importance [size]` is the walk's `1 / U_rr^2`. Only the first `rows` (traced, a multiple of 32) belong to the
        group; the others and their importance are zero. The columns are those of `matrices` of equal width, each of
        which has a maximum of its own.
        """
        ...


def search_scales(
    w: jax.Array,
    bits: jax.Array,
    importance: jax.Array | None = None,
    kernels: Kernels = XLA,
    rows: jax.Array | None = None,
    matrices: int = 1,
) -> ScaleChoice:
    """Choose the scales of a group as stock does (`ScaleSearch`).

    Minimises `sum |clamp(rint(w / (s p))) s p - w|^3.5` over the 97 multipliers `p`, the same for every column of the
    group; the rows' `importance` counts for nothing. docs/format.md 2.6. In units of a column's
    base scale `s` its loss is `s^3.5 sum |clamp(rint(x / p)) p - x|^3.5`, and `s^3.5` is `(qs / 16)^7` times a
    constant.
    """
    codes = jnp.exp2(bits.astype(jnp.float32))
    base, smax = _base_scales(w, codes, matrices)
    qs = jnp.clip(jnp.round(jnp.sqrt(base / smax) * MAX_INDEX), 1, MAX_INDEX)
    steps = w / (jnp.square(qs / MAX_INDEX) * smax)
    losses = kernels.scale_losses(steps, jnp.asarray(GRID)[:, None], codes, None, rows)
    losses, weights = (x.reshape(*x.shape[:-1], matrices, -1) for x in (losses, (qs / MAX_INDEX) ** 7))
    total = jnp.einsum("pmn,mn->pm", losses, weights, precision=lax.Precision.HIGHEST)
    return _choice(qs, smax, jnp.asarray(GRID)[jnp.argmin(total, axis=0)])


def search_columns(
    w: jax.Array,
    bits: jax.Array,
    importance: jax.Array | None = None,
    kernels: Kernels = XLA,
    rows: jax.Array | None = None,
    matrices: int = 1,
) -> ScaleChoice:
    """Choose the scales of a group by least squared error, an index for every column (`ScaleSearch`).

    Minimises `sum_rn importance_r (clamp(rint(w / s)) s - w)^2` with `s = (qs / 16)^2 p smax` over the multipliers `p`
    of the group and the index `qs` of each column within `OFFSETS`. With `importance` (None: ones) that is what GPTQ
    adds to its loss, and the format's whole freedom, where stock scales all columns by one multiplier.
    """
    importance = jnp.ones(len(w), jnp.float32) if importance is None else importance / jnp.max(importance)
    codes = jnp.exp2(bits.astype(jnp.float32))
    base, smax = _base_scales(w, codes, matrices)
    p = jnp.asarray(MULTIPLIERS)[:, None, None]
    holds = jnp.round(jnp.sqrt(base / (smax * p)) * MAX_INDEX)
    qs = jnp.clip(holds + jnp.asarray(OFFSETS)[:, None], 1, MAX_INDEX)  # [multipliers, offsets, N]
    scales = jnp.square(qs / MAX_INDEX) * p
    losses = kernels.scale_losses(w / smax, scales.reshape(-1, w.shape[1]), codes, importance, rows).reshape(qs.shape)
    least = jnp.min(losses, axis=1).reshape(len(MULTIPLIERS), matrices, -1)
    best = jnp.argmin(jnp.sum(least, axis=2), axis=0)  # [matrices]
    of_column = jnp.repeat(best, w.shape[1] // matrices)[None, None]
    own = jnp.argmin(jnp.take_along_axis(losses, of_column, axis=0), axis=1)[:, None]
    chosen = jnp.take_along_axis(jnp.take_along_axis(qs, of_column, axis=0), own, axis=1)
    return _choice(chosen[0, 0], smax, jnp.asarray(MULTIPLIERS)[best])


TRIALS: dict[ScaleSearch, int] = {search_scales: len(GRID), search_columns: len(MULTIPLIERS) * len(OFFSETS)}
"""How many scales a search tries on every weight: what it costs."""


def _base_scales(w: jax.Array, codes: jax.Array, matrices: int) -> tuple[jax.Array, jax.Array]:
    """The scale `[N]` at which the widest weight of each column is the widest level, and the largest of its matrix."""
    base = (jnp.max(jnp.abs(w), axis=0) + 1e-12) / ((codes - 1) / 2)
    return base, _by_column(jnp.max(base.reshape(matrices, -1), axis=1), len(base))


def _by_column(of_matrix: jax.Array, columns: int) -> jax.Array:
    """A value of each of the matrices for all its columns."""
    return jnp.broadcast_to(of_matrix[:, None], (len(of_matrix), columns // len(of_matrix))).reshape(-1)


def _choice(qs: jax.Array, smax: jax.Array, multiplier: jax.Array) -> ScaleChoice:
    """The choice as it is stored; `smax [N]`, `multiplier [matrices]`."""
    matrices, columns = len(multiplier), len(qs)
    qscale_max = jnp.minimum(smax[:: columns // matrices] * multiplier, HALF_MAX).astype(jnp.float16)
    scale = half_scale(_by_column(qscale_max, columns), qs)
    if matrices == 1:
        qscale_max, multiplier = qscale_max[0], multiplier[0]
    return ScaleChoice(qs.astype(jnp.uint8), qscale_max, scale, multiplier)
