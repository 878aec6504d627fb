"""Hessians of linears: accumulation, act-order, damping, and the upper factor of the inverse."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from exl2jax.ops.products import sum_over_tokens

DAMPING = 0.12
"""Share of the mean diagonal added to the diagonal."""

MIN_DAMPING = 1e-5
MAX_ATTEMPTS = 10

_LEAF = 128

_STRIPS = 4
"""Block rows of a Hessian of which only the upper triangle is computed: 5/8 of the work."""


class HessianFactor(NamedTuple):
    """The factored Hessian, as GPTQ needs it.

    `perm [K]` rows by descending diagonal, `inv_perm [K]`, `u [K, K]` the upper Cholesky factor of the permuted damped
    inverse, `damping []` the value added in the end, `attempts []` how often it was tried, `ok []` whether it worked,
    `finite []` whether the Hessian held only finite values, `dead []` how many of its inputs are never active.
    Failure is data here; callers outside `jit` turn it into an error that names the linear.
    """

    perm: jax.Array
    inv_perm: jax.Array
    u: jax.Array
    damping: jax.Array
    attempts: jax.Array
    ok: jax.Array
    finite: jax.Array
    dead: jax.Array

    @classmethod
    def identity(cls, perm: jax.Array) -> "HessianFactor":
        """The factor of inputs that know nothing of each other, with rows in the order `perm [K]`."""
        scalars = (jnp.float32(0), jnp.int32(0), jnp.bool_(True), jnp.bool_(True), jnp.int32(0))
        return cls(perm, jnp.argsort(perm), jnp.eye(len(perm)), *scalars)


type Order = Callable[[jax.Array], jax.Array]
"""An order of the rows from the diagonal `[K]` of the Hessian: `perm [K]`; hashable."""

type Damping = Callable[[jax.Array], tuple[jax.Array, float]]
"""From the ordered Hessian `[K, K]`, the first value to add to its diagonal and what failure multiplies it by."""


def accumulate_hessian(h: jax.Array, x: jax.Array) -> jax.Array:
    """`h + X^T X` for inputs `x [..., K]` flattened to tokens, summed in float32 (`ops/products.py`)."""
    return h + gram(x.reshape(-1, x.shape[-1]))


def gram(tokens: jax.Array) -> jax.Array:
    """`X^T X [K, K]` of `tokens [T, K]`, one triangle of blocks computed and the other mirrored."""
    size = -(-tokens.shape[-1] // _STRIPS)
    edges = range(0, tokens.shape[-1], size)
    blocks: dict[tuple[int, int], jax.Array] = {}
    for a in edges:
        strip = sum_over_tokens(tokens[:, a : a + size], tokens[:, a:])
        blocks |= {(a, b): strip[:, b - a : b - a + size] for b in edges if b >= a}
    return jnp.block([[blocks[a, b] if b >= a else blocks[b, a].T for b in edges] for a in edges])


def descending(diagonal: jax.Array) -> jax.Array:
    """Act-order: rows by descending diagonal."""
    return jnp.argsort(-diagonal, stable=True)


def share_of_mean(h: jax.Array) -> tuple[jax.Array, float]:
    """Stock's damping: 0.12 of the mean diagonal, at least 1e-5, doubled at failure."""
    return jnp.maximum(DAMPING * jnp.mean(jnp.diagonal(h)), MIN_DAMPING), 2.0


@partial(jax.jit, static_argnames=("order", "damping"))
def factorize(h: jax.Array, order: Order = descending, damping: Damping = share_of_mean) -> HessianFactor:
    """Permute, damp and factor a Hessian `h [K, K]` (sum over rows of `X^T X`, over the number of rows).

    The damping grows on failure, ten attempts at most. With `J` the reversal and `J H J = L L^T`, `U = J inv(L) J`
    needs one Cholesky and no inverse of H.
    """
    diagonal = jnp.diagonal(h)
    perm = order(diagonal)
    ordered = h[perm][:, perm]
    first, growth = damping(ordered)
    eye = jnp.eye(h.shape[0], dtype=h.dtype)

    def attempt(value: jax.Array) -> jax.Array:
        return jnp.linalg.cholesky((ordered + value * eye)[::-1, ::-1], symmetrize_input=False)

    def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        lower, _, attempts = state
        return ~jnp.all(jnp.isfinite(lower)) & (attempts < MAX_ATTEMPTS)

    def again(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        _, value, attempts = state
        return attempt(growth * value), growth * value, attempts + 1

    lower, value, attempts = lax.while_loop(failed, again, (attempt(first), first, jnp.int32(1)))
    u = lax.platform_dependent(lower, cpu=lower_inverse, default=_library_inverse)[::-1, ::-1]
    # An infinite diagonal makes the damping infinite and U zero: finite, but no factor of anything.
    ok = jnp.all(jnp.isfinite(u)) & jnp.isfinite(value)
    dead = jnp.sum(diagonal == 0, dtype=jnp.int32)
    return HessianFactor(perm, jnp.argsort(perm), u, value, attempts, ok, jnp.all(jnp.isfinite(h)), dead)


@jax.jit
def solve(factor: HessianFactor, b: jax.Array) -> jax.Array:
    """`(H + l I)^-1 b` for `b [K, N]`, from the factor: the permuted inverse is `U^T U`."""
    with jax.default_matmul_precision("highest"):
        return (factor.u.T @ (factor.u @ b[factor.perm]))[factor.inv_perm]


def _library_inverse(lower: jax.Array) -> jax.Array:
    """`lower_inverse` in one call of the platform's library, for devices where many small products cost launches."""
    return lax.linalg.triangular_solve(lower, jnp.eye(lower.shape[0], dtype=lower.dtype), left_side=True, lower=True)


def lower_inverse(lower: jax.Array) -> jax.Array:
    """Inverse of a lower triangular matrix `[K, K]`, by halves so that nearly all work is matrix products."""
    k = lower.shape[0]
    if k <= _LEAF:
        return jax.scipy.linalg.solve_triangular(lower, jnp.eye(k, dtype=lower.dtype), lower=True)
    half = k // 2
    a, c = lower_inverse(lower[:half, :half]), lower_inverse(lower[half:, half:])
    with jax.default_matmul_precision("highest"):
        b = -(c @ lower[half:, :half]) @ a
    return jnp.block([[a, jnp.zeros((half, k - half), lower.dtype)], [b, c]])
