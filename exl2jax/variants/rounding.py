"""Roundings of a whole matrix in permuted order, in plain code that is made to be read and copied.

GPTQ itself (`stock`) runs in the walk of `exl2jax.ops`; the one here is what other roundings begin with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from exl2jax.ops import HessianFactor, dequantize, half_scale, quantize
from exl2jax.ops.scales import ScaleChoice
from exl2jax.qparams import Group
from exl2jax.variants.registry import NoSettings, variant

type Search = Callable[[jax.Array, jax.Array, jax.Array], ScaleChoice]
"""Scale search of a group `(w [rows, N], bits, importance [rows])`; hashable, so that it can be static under `jit`."""


class Ordered(NamedTuple):
    """A matrix to round: `w [K, N]` float32 in permuted order, the factor of its Hessian, its groups."""

    w: jax.Array
    factor: HessianFactor
    groups: tuple[Group, ...]


class Rounded(NamedTuple):
    """Result in permuted order: `codes [K, N]` uint8, `qs [G, N]` uint8 in 1..16, `qscale_max [G]` float16."""

    codes: jax.Array
    qs: jax.Array
    qscale_max: jax.Array


@dataclass(frozen=True, kw_only=True, slots=True)
class DescentSettings:
    """Sweeps over all rows after GPTQ."""

    sweeps: int = 2

    def __post_init__(self) -> None:
        """Refuse none."""
        if self.sweeps < 1:
            raise ValueError("sweeps must be at least 1")


@variant("rounding", "stock")
def stock(walk: Ordered, search: Search, settings: NoSettings) -> Rounded:
    """GPTQ: the rows after a row make up for its error over `U_ii` (arXiv:2210.17323; docs/format.md 2.5)."""
    return walk_groups(walk, walk.factor.u, search)


@variant("rounding", "descent", DescentSettings)
def descent(walk: Ordered, search: Search, settings: DescentSettings) -> Rounded:
    """GPTQ, then coordinate descent on the codes with the scales held: row by row the best code given all others
    (QuantEase, arXiv:2309.01885).
    """  # noqa: D205
    found = walk_groups(walk, walk.factor.u, search)
    scale, bits = by_row(found, walk.groups)
    h = damped_hessian(walk.factor.u)
    codes = found.codes
    for _ in range(settings.sweeps):
        codes = _sweep(walk.w, h, codes, scale, bits)
    return found._replace(codes=codes)


def walk_groups(walk: Ordered, u: jax.Array, search: Search) -> Rounded:
    """Left-looking walk: a group owes the rows before it `U[:a, a:b]^T E`, then goes row by row."""
    errors, codes, scales = jnp.zeros_like(walk.w), jnp.zeros(walk.w.shape, jnp.uint8), []
    for group in walk.groups:
        start, bits = jnp.int32(group.start), jnp.float32(group.bits)
        errors, codes, choice = _group(walk.w, u, errors, codes, start, bits, rows=group.rows, search=search)
        scales.append(choice)
    qs, maxima = (jnp.stack([getattr(c, name) for c in scales]) for name in ("qs", "qscale_max"))
    return Rounded(codes, qs, maxima)


@partial(jax.jit, static_argnames=("rows", "search"))
def _group(
    w: jax.Array,
    u: jax.Array,
    errors: jax.Array,
    codes: jax.Array,
    start: jax.Array,
    bits: jax.Array,
    *,
    rows: int,
    search: Search,
) -> tuple[jax.Array, jax.Array, ScaleChoice]:
    toward = lax.dynamic_slice_in_dim(u, start, rows, 1)
    owed = jnp.matmul(toward.T, errors, precision=lax.Precision.HIGHEST)  # rows not walked yet have no errors
    current = lax.dynamic_slice_in_dim(w, start, rows, 0) - owed
    corner = lax.dynamic_slice_in_dim(toward, start, rows, 0)
    diagonal = jnp.diagonal(corner)
    choice = search(current, bits, 1 / jnp.square(diagonal))

    def row(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own, found = state
        now = current[i] - jnp.matmul(corner[:, i], own, precision=lax.Precision.HIGHEST)
        code = quantize(now, choice.scale, bits)
        own = own.at[i].set((now - dequantize(code, choice.scale, bits)) / diagonal[i])
        return own, found.at[i].set(code.astype(jnp.uint8))

    own, found = lax.fori_loop(0, rows, row, (jnp.zeros_like(current), jnp.zeros(current.shape, jnp.uint8)))
    errors = lax.dynamic_update_slice_in_dim(errors, own, start, 0)
    return errors, lax.dynamic_update_slice_in_dim(codes, found, start, 0), choice


@jax.jit
def damped_hessian(u: jax.Array) -> jax.Array:
    """The damped Hessian in permuted order: its inverse is `U^T U`."""
    inverse = jax.scipy.linalg.solve_triangular(u, jnp.eye(u.shape[0], dtype=u.dtype), lower=False)
    return jnp.matmul(inverse, inverse.T, precision=lax.Precision.HIGHEST)


def by_row(found: Rounded, groups: tuple[Group, ...]) -> tuple[jax.Array, jax.Array]:
    """Working scales `[K, N]` and widths `[K, 1]` of every row."""
    counts = jnp.asarray([g.rows for g in groups])
    total = sum(g.rows for g in groups)
    scale = half_scale(found.qscale_max[:, None], found.qs)
    bits = jnp.asarray([g.bits for g in groups], jnp.float32)[:, None]
    return tuple(jnp.repeat(x, counts, axis=0, total_repeat_length=total) for x in (scale, bits))  # type: ignore[return-value]


def weight_of(found: Rounded, groups: tuple[Group, ...], inv_perm: jax.Array) -> jax.Array:
    """The weight that this dequantizes to, `[K, N]` float16 in original row order."""
    return dequantize(found.codes, *by_row(found, groups)).astype(jnp.float16)[inv_perm]


@jax.jit
def _sweep(w: jax.Array, h: jax.Array, codes: jax.Array, scale: jax.Array, bits: jax.Array) -> jax.Array:
    """The best code of each row given all others: the weight that zeroes the row's gradient, rounded."""

    def row(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error, codes = state
        pull = jnp.matmul(h[i], error, precision=lax.Precision.HIGHEST) - h[i, i] * error[i]
        code = quantize(w[i] - pull / h[i, i], scale[i], bits[i])
        error = error.at[i].set(dequantize(code, scale[i], bits[i]) - w[i])
        return error, codes.at[i].set(code.astype(jnp.uint8))

    return lax.fori_loop(0, w.shape[0], row, (dequantize(codes, scale, bits) - w, codes))[1]
