"""Error propagation: quantize each linear for the inputs the quantized model gives it, towards full-precision outputs.

With `X_q` the inputs in the quantized model and `X_f` those in the full-precision one, the target of a linear is
`W* = W + a (H + l I)^-1 X_q^T (X_f - X_q) W`, `H = X_q^T X_q` (QEP, arXiv:2504.09629). For the linear that writes to
the residual stream, the stream's own error `h_f - h_q` can be part of what it corrects.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.models import Decoder
from exl2jax.ops import HessianFactor
from exl2jax.pipeline.stream import row_chunks


class CrossTerms(NamedTuple):
    """Sums over tokens, per row of calibration: `hessian = X_q^T X_q`, `cross = X_q^T (X_f - X_q)`, both `[K, K]`, and
    `residual = X_q^T (h_f - h_q)` `[K, D]`, of the second stage only.
    """  # noqa: D205

    hessian: jax.Array
    cross: jax.Array
    residual: jax.Array | None = None

    def scaled(self, factor: float) -> "CrossTerms":
        """All sums times `factor`."""
        return jax.tree.map(lambda x: x * factor, self)


def corrected_target(
    kernel: jax.Array, factor: HessianFactor, terms: CrossTerms, strength: float, residual_strength: float
) -> jax.Array:
    """The weight to quantize instead of `kernel [K, N]`; the factor's own damping is `l`."""
    wanted = strength * jnp.matmul(terms.cross, kernel, precision=lax.Precision.HIGHEST)
    if terms.residual is not None and residual_strength:
        wanted = wanted + residual_strength * terms.residual
    return kernel + _solve(factor, wanted)


@jax.jit
def _solve(factor: HessianFactor, b: jax.Array) -> jax.Array:
    """`(H + l I)^-1 b` from the factor: the permuted inverse is `U^T U`."""
    with jax.default_matmul_precision("highest"):
        return (factor.u.T @ (factor.u @ b[factor.perm]))[factor.inv_perm]


def first_terms(
    decoder: Decoder, kind: str, params: Any, states: np.ndarray, reference: np.ndarray, mask: np.ndarray | None
) -> CrossTerms:
    """Cross terms of the first stage, which reads the normed states of both streams."""
    terms = None
    mask = np.ones(states.shape[:2], np.float32) if mask is None else mask.astype(np.float32)
    for chunk in row_chunks(states):
        arrays = (chunk.take(states), chunk.take(reference), chunk.take(mask))
        terms = _first_chunk(decoder, kind, params, *arrays, terms)
    assert terms is not None  # there is at least one row
    return terms.scaled(1 / len(states))


def second_terms(
    decoder: Decoder,
    kind: str,
    params: Any,
    quantized: Any,
    states: np.ndarray,
    reference: np.ndarray,
    mask: np.ndarray | None,
    *,
    residual: bool,
) -> tuple[CrossTerms, np.ndarray]:
    """Cross terms of the second stage, whose inputs come through the quantized first stage, and the next reference.

    `residual` asks for the products with the stream's own error as well.
    """
    terms, out = None, np.empty_like(reference)
    mask = np.ones(states.shape[:2], np.float32) if mask is None else mask.astype(np.float32)
    for chunk in row_chunks(states):
        arrays = (chunk.take(states), chunk.take(reference), chunk.take(mask))
        terms, hidden = _second_chunk(decoder, kind, params, quantized, *arrays, terms, residual)
        chunk.put(out, hidden)
    assert terms is not None  # there is at least one row
    return terms.scaled(1 / len(states)), out


def _add(terms: CrossTerms | None, x: jax.Array, y: jax.Array, residual: jax.Array | None) -> CrossTerms:
    """Add the products of a chunk's inputs, quantized `x` and full-precision `y`, tokens flattened."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    with jax.default_matmul_precision("highest"):
        new = CrossTerms(
            x.T @ x, x.T @ (y - x), None if residual is None else x.T @ residual.reshape(-1, residual.shape[-1])
        )
    return new if terms is None else jax.tree.map(jnp.add, terms, new)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=6)
def _first_chunk(
    decoder: Decoder, kind: str, params: Any, h: jax.Array, ref: jax.Array, mask: jax.Array, terms: CrossTerms | None
) -> CrossTerms:
    weight = mask[:, :, None]
    x, y = (decoder.first_input(kind, params, s) * weight for s in (h, ref))
    return _add(terms, x, y, None)


@partial(jax.jit, static_argnums=(0, 1, 8), donate_argnums=7)
def _second_chunk(
    decoder: Decoder,
    kind: str,
    params: Any,
    quantized: Any,
    h: jax.Array,
    ref: jax.Array,
    mask: jax.Array,
    terms: CrossTerms | None,
    residual: bool,
) -> tuple[CrossTerms, jax.Array]:
    def between(p: Any, s: jax.Array) -> jax.Array:
        return decoder.second_input(kind, p, decoder.first(kind, p, decoder.first_input(kind, p, s)))

    weight = mask[:, :, None]
    x, y = between(quantized, h), between(params, ref)
    hidden = decoder.residual(kind, params, ref, decoder.second(kind, params, y))
    return _add(terms, x * weight, y * weight, (ref - h) * weight if residual else None), hidden
