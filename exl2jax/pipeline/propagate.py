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

from exl2jax.models import Decoder, ModuleSpec
from exl2jax.ops import HessianFactor
from exl2jax.pipeline.stream import group_weights, or_identity, row_chunks


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


class StageTerms(NamedTuple):
    """Cross terms of each group of a stage, the tokens that went into them, and the next full-precision states: after
    the last stage the module's output, before it still its input.
    """  # noqa: D205

    terms: list[CrossTerms]
    tokens: list[int]
    reference: np.ndarray


def stage_terms(
    decoder: Decoder,
    spec: ModuleSpec,
    stage: int,
    params: Any,
    quantized: Any,
    states: np.ndarray,
    reference: np.ndarray,
    mask: np.ndarray | None,
    *,
    residual: bool = False,
    routed_only: bool = True,
) -> StageTerms:
    """Cross terms of a stage, whose inputs come through the stages before: quantized ones, and full-precision ones.

    `residual` asks for the products with the stream's own error as well. An expert's tokens are those that the
    quantized model routes to it, unless not `routed_only`; without any its Hessian is the identity.
    """
    last = stage == len(spec.stages) - 1
    sums, out = None, np.empty_like(reference) if last else reference
    mask = np.ones(states.shape[:2], np.float32) if mask is None else mask.astype(np.float32)
    for chunk in row_chunks(states):
        arrays = (chunk.take(states), chunk.take(reference), chunk.take(mask))
        hidden, sums = _chunk(decoder, spec.kind, stage, residual, routed_only, params, quantized, *arrays, sums)
        if last:
            chunk.put(out, hidden)
    assert sums is not None  # there is at least one row
    tokens = [round(float(n)) for n in sums[1]]
    terms = [term.scaled(1 / len(states)) for term in sums[0]]
    terms = [term._replace(hessian=or_identity(term.hessian, n)) for term, n in zip(terms, tokens, strict=True)]
    return StageTerms(terms, tokens, out)


def _add(terms: CrossTerms | None, x: jax.Array, y: jax.Array, residual: jax.Array | None) -> CrossTerms:
    """Add the products of a chunk's inputs, quantized `x` and full-precision `y`, tokens flattened."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    with jax.default_matmul_precision("highest"):
        new = CrossTerms(
            x.T @ x, x.T @ (y - x), None if residual is None else x.T @ residual.reshape(-1, residual.shape[-1])
        )
    return new if terms is None else jax.tree.map(jnp.add, terms, new)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=10)
def _chunk(
    decoder: Decoder,
    kind: str,
    stage: int,
    residual: bool,
    routed_only: bool,
    params: Any,
    quantized: Any,
    h: jax.Array,
    ref: jax.Array,
    mask: jax.Array,
    sums: tuple[list[CrossTerms], list[jax.Array]] | None,
) -> tuple[jax.Array, tuple[list[CrossTerms], list[jax.Array]]]:
    """The full-precision output of a chunk (in the last stage), and the sums with its products added."""
    xs, _ = _run(decoder, kind, stage, quantized, h)
    ys, hidden = _run(decoder, kind, stage, params, ref)
    weights = group_weights(decoder.routed(kind, quantized, h) if routed_only else None, len(xs), mask)
    terms, tokens = (None, None) if sums is None else sums
    new = [
        _add(
            terms[g] if terms else None,
            x * w[:, :, None],
            y * w[:, :, None],
            (ref - h) * w[:, :, None] if residual else None,
        )
        for g, (x, y, w) in enumerate(zip(xs, ys, weights, strict=True))
    ]
    counts = [jnp.sum(w) + (tokens[g] if tokens else 0) for g, w in enumerate(weights)]
    return hidden, (new, counts)


def _run(decoder: Decoder, kind: str, stage: int, params: Any, h: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """What a stage reads, and the module's output if it is the last one (else `h`); later linears are not touched."""
    outputs: dict[str, jax.Array] = {}
    for before in range(stage):
        outputs |= decoder.linears(kind, before, params, decoder.inputs(kind, before, params, h, outputs))
    inputs = decoder.inputs(kind, stage, params, h, outputs)
    if stage < decoder.stages(kind) - 1:
        return inputs, h
    return inputs, decoder.output(kind, params, h, outputs | decoder.linears(kind, stage, params, inputs))
