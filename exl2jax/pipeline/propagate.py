"""Error propagation: quantize each linear for the inputs the quantized model gives it, towards full-precision outputs.

With `X_q` the inputs in the quantized model, `X_f` those in the full-precision one and `H = X_q^T X_q`, the target of a
linear is `W* = W + (H + l I)^-1 X_q^T (a (X_f - X_q) W + r (h_f - h_q))`. The term with `a` is QEP (arXiv:2504.09629);
the one with `r` is for linears that write to the residual stream: they take back what they can of its own error.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.models import Decoder, ModuleSpec
from exl2jax.ops import HessianFactor, gram
from exl2jax.pipeline.devices import on_all_devices, on_one_device
from exl2jax.pipeline.stream import full_mask, group_weights, or_identity, row_chunks


class Strengths(NamedTuple):
    """`inputs` is `a`; `residual` is `r` in units of the linears that write to the residual stream."""

    inputs: float
    residual: float


class CrossTerms(NamedTuple):
    """Sums over tokens, per row of calibration: `hessian = X_q^T X_q` `[K, K]`, and what the target owes them.

    Linears of a stage before the last share `cross = X_q^T (X_f - X_q)` `[K, K]`; the one of the last stage has fewer
    columns than rows and takes `owed [K, N]`, the whole product, strengths included.
    """

    hessian: jax.Array
    cross: jax.Array | None = None
    owed: jax.Array | None = None

    def scaled(self, factor: float) -> "CrossTerms":
        """All sums times `factor`."""
        return jax.tree.map(lambda x: x * factor, self)


def corrected_target(kernel: jax.Array, factor: HessianFactor, terms: CrossTerms, strengths: Strengths) -> jax.Array:
    """The weight to quantize instead of `kernel [K, N]`; the factor's own damping is `l`."""
    if terms.owed is not None:
        return kernel + _solve(factor, terms.owed)
    assert terms.cross is not None  # one of them always is
    correction = _solve(factor, strengths.inputs * terms.cross)
    return kernel + jnp.matmul(correction, kernel, precision=lax.Precision.HIGHEST)


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
    strengths: Strengths,
    *,
    routed_only: bool = True,
) -> StageTerms:
    """Cross terms of a stage, whose inputs come through the stages before: quantized ones, and full-precision ones.

    An expert's tokens are those that the quantized model routes to it, unless not `routed_only`; without any its
    Hessian is the identity.
    """
    last = stage == len(spec.stages) - 1
    sums, out = None, np.empty_like(reference) if last else reference
    mask = full_mask(states, mask)
    params, quantized = on_all_devices((params, quantized))
    for chunk in row_chunks(states):
        arrays = (chunk.take(states), chunk.take(reference), chunk.take(mask))
        hidden, sums = _chunk(decoder, spec.kind, stage, strengths, routed_only, params, quantized, *arrays, sums)
        if last:
            chunk.put(out, hidden)
    assert sums is not None  # there is at least one row
    sums = on_one_device(sums)
    tokens = [round(float(n)) for n in sums[1]]
    terms = [term.scaled(1 / len(states)) for term in sums[0]]
    terms = [term._replace(hessian=or_identity(term.hessian, n)) for term, n in zip(terms, tokens, strict=True)]
    return StageTerms(terms, tokens, out)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=10)
def _chunk(
    decoder: Decoder,
    kind: str,
    stage: int,
    strengths: Strengths,
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
    if stage == decoder.stages(kind) - 1:
        kernels = [params[name]["kernel"] for (name,) in decoder.names(kind)[stage]]
        new = [_last(x, y, ref - h, w, k, strengths) for x, y, w, k in zip(xs, ys, weights, kernels, strict=True)]
    else:
        new = [cross_terms(x, y, w) for x, y, w in zip(xs, ys, weights, strict=True)]
    return hidden, added(sums, (new, [jnp.sum(w) for w in weights]))


def added[T](sums: T | None, more: T) -> T:
    """Sums over the chunks so far, None before the first, and one chunk's."""
    return more if sums is None else jax.tree.map(jnp.add, sums, more)


def cross_terms(x: jax.Array, y: jax.Array | None, weight: jax.Array) -> CrossTerms:
    """Products of a chunk's inputs, quantized `x` and full-precision `y` `[B, T, K]`, each token by its `weight`.

    Without `y` there is the Hessian alone.
    """
    x = _tokens(x, weight)
    if y is None:
        return CrossTerms(gram(x))
    return CrossTerms(gram(x), cross=jnp.matmul(x.T, _tokens(y, weight) - x, precision=lax.Precision.HIGHEST))


def _last(
    x: jax.Array, y: jax.Array, error: jax.Array, weight: jax.Array, kernel: jax.Array, strengths: Strengths
) -> CrossTerms:
    """The same for the linear of weight `kernel` that writes to the stream, whose own error is `error`."""
    x, y = _tokens(x, weight), _tokens(y, weight)
    missing = strengths.inputs * jnp.matmul(y - x, kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    if strengths.residual:
        missing = missing + strengths.residual * _tokens(error, weight)
    return CrossTerms(gram(x), owed=jnp.matmul(x.T, missing, precision=lax.Precision.HIGHEST))


def _tokens(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Rows end to end, each token by its weight."""
    return (x * weight[..., None]).reshape(-1, x.shape[-1])


def _run(decoder: Decoder, kind: str, stage: int, params: Any, h: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """What a stage reads, and the module's output if it is the last one (else `h`); later linears are not touched."""
    outputs: dict[str, jax.Array] = {}
    for before in range(stage):
        outputs |= decoder.linears(kind, before, params, decoder.inputs(kind, before, params, h, outputs))
    inputs = decoder.inputs(kind, stage, params, h, outputs)
    if stage < decoder.stages(kind) - 1:
        return inputs, h
    return inputs, decoder.output(kind, params, h, outputs | decoder.linears(kind, stage, params, inputs))
