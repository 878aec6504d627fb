"""Scale searches of a group: one 4-bit index per column and one maximum per group."""

from collections.abc import Callable
from typing import NamedTuple

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
    """Scales of one group: `qs [N]` index 1..16, `qscale_max []` as exact half, `scale [N]` the working scale."""

    qs: jax.Array
    qscale_max: jax.Array
    scale: jax.Array
    multiplier: jax.Array


type ScaleSearch = Callable[[jax.Array, jax.Array, jax.Array | None, Kernels], ScaleChoice]
"""A search `(w [rows, N], bits, importance [rows], kernels)`; hashable, so that it can be static under `jit`."""


def search_scales(
    w: jax.Array, bits: jax.Array, importance: jax.Array | None = None, kernels: Kernels = XLA
) -> ScaleChoice:
    """Choose the scales of the group `w [rows, N]` float32 at the width `bits` (scalar, may be traced), as stock does.

    Minimises `sum |clamp(rint(w / (s p))) s p - w|^3.5` over the 97 multipliers `p`, the same for every column of the
    group; `rows` must be a multiple of 32, and their `importance` counts for nothing. docs/format.md 2.6.
    In units of a column's base scale `s` its loss is `s^3.5 sum |clamp(rint(x / p)) p - x|^3.5`, and `s^3.5` is
    `(qs / 16)^7` times a constant.
    """
    codes = jnp.exp2(bits.astype(jnp.float32))
    base, smax = _base_scales(w, codes)
    qs = jnp.clip(jnp.round(jnp.sqrt(base / smax) * MAX_INDEX), 1, MAX_INDEX)
    steps = w / (jnp.square(qs / MAX_INDEX) * smax)
    losses = kernels.scale_losses(steps, jnp.asarray(GRID)[:, None], codes)
    total = jnp.matmul(losses, (qs / MAX_INDEX) ** 7, precision=lax.Precision.HIGHEST)
    return _choice(qs, smax, jnp.asarray(GRID)[jnp.argmin(total)])


def search_columns(
    w: jax.Array, bits: jax.Array, importance: jax.Array | None = None, kernels: Kernels = XLA
) -> ScaleChoice:
    """Choose the scales of the group `w [rows, N]` float32 by least squared error, an index for every column.

    Minimises `sum_rn importance_r (clamp(rint(w / s)) s - w)^2` with `s = (qs / 16)^2 p smax` over the multipliers `p`
    of the group and the index `qs` of each column within `OFFSETS`. With `importance [rows]` the walk's `1 / U_rr^2`
    (None: ones) that is what GPTQ adds to its loss, and the format's whole freedom, where stock scales all columns by
    one multiplier. `rows` must be a multiple of 32.
    """
    importance = jnp.ones(len(w), jnp.float32) if importance is None else importance / jnp.max(importance)
    codes = jnp.exp2(bits.astype(jnp.float32))
    base, smax = _base_scales(w, codes)
    p = jnp.asarray(MULTIPLIERS)[:, None, None]
    holds = jnp.round(jnp.sqrt(base / (smax * p)) * MAX_INDEX)
    qs = jnp.clip(holds + jnp.asarray(OFFSETS)[:, None], 1, MAX_INDEX)  # [multipliers, offsets, N]
    scales = jnp.square(qs / MAX_INDEX) * p
    losses = kernels.scale_losses(w / smax, scales.reshape(-1, w.shape[1]), codes, importance).reshape(qs.shape)
    best = jnp.argmin(jnp.sum(jnp.min(losses, axis=1), axis=1))
    own = jnp.argmin(losses[best], axis=0)
    return _choice(jnp.take_along_axis(qs[best], own[None], axis=0)[0], smax, jnp.asarray(MULTIPLIERS)[best])


TRIALS: dict[ScaleSearch, int] = {search_scales: len(GRID), search_columns: len(MULTIPLIERS) * len(OFFSETS)}
"""How many scales a search tries on every weight: what it costs."""


def _base_scales(w: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scale `[N]` at which the widest weight of each column is the widest level, and the largest of them."""
    base = (jnp.max(jnp.abs(w), axis=0) + 1e-12) / ((codes - 1) / 2)
    return base, jnp.max(base)


def _choice(qs: jax.Array, smax: jax.Array, multiplier: jax.Array) -> ScaleChoice:
    """The choice as it is stored."""
    qscale_max = jnp.minimum(smax * multiplier, HALF_MAX).astype(jnp.float16)
    return ScaleChoice(qs.astype(jnp.uint8), qscale_max, half_scale(qscale_max, qs), multiplier)
