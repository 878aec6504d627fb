"""Error propagation: quantize each linear for the inputs the quantized model gives it, towards full-precision outputs.

With `X_q` the inputs in the quantized model, `X_f` those in the full-precision one and `H = X_q^T X_q`, the target of a
linear is `W* = W + (H + l I)^-1 X_q^T (a (X_f - X_q) W + r (h_f - h_q))`. The term with `a` is QEP (arXiv:2504.09629);
the one with `r` is for linears that write to the residual stream: they take back what they can of its own error.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.models import Decoder, ModuleSpec
from exl2jax.ops import HessianFactor, gram
from exl2jax.stream.chunks import full_mask, row_chunks
from exl2jax.stream.devices import on_all_devices, on_one_device
from exl2jax.stream.hessians import group_weights, or_identity
from exl2jax.stream.token_classes import token_factors

KEPT_BYTES = 1 << 29
"""Inputs of a module's last stage that are kept in memory, so that its outputs need not be computed from the start."""


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

    `inputs` is what each group of the last stage reads in the quantized model, `[R, T, K]`, None where it was not kept.
    """  # noqa: D205

    terms: list[CrossTerms]
    tokens: list[int]
    reference: np.ndarray
    inputs: list[np.ndarray] | None = None


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
    tables: np.ndarray | None = None,
) -> StageTerms:
    """Cross terms of a stage, whose inputs come through the stages before: quantized ones, and full-precision ones.

    An expert's tokens are those that the quantized model routes to it, unless not `routed_only`; without any its
    Hessian is the identity. What the last stage reads is kept if it takes `KEPT_BYTES` at most. `tables [groups of the
    stage, CLASSES]` weigh the tokens by class (`exl2jax.stream.token_classes`), in all terms.
    """
    last = stage == len(spec.stages) - 1
    sums, out, kept = None, np.empty_like(reference) if last else reference, _room(spec, states) if last else None
    mask = full_mask(states, mask)
    params, quantized, tables = on_all_devices((params, quantized, tables))
    for chunk in row_chunks(states):
        h, ref, m = chunk.take(states), chunk.take(reference), chunk.take(mask)
        xs = _inputs(decoder, spec.kind, stage, quantized, h)
        ys = _inputs(decoder, spec.kind, stage, params, ref)
        how = (decoder, spec.kind, stage, strengths, routed_only)
        hidden, sums = _add_chunk(*how, params, quantized, tables, h, ref, m, xs, ys, sums)
        if last:
            chunk.put(out, hidden)
        for array, x in zip(kept or (), xs, strict=kept is not None):
            chunk.put(array, x)
    assert sums is not None  # there is at least one row
    terms, counts = on_one_device(sums)
    tokens = [round(float(n)) for n in counts]
    terms = [term.scaled(1 / len(states)) for term in terms]
    if last:
        kernels = [params[linear.name]["kernel"] for (linear,) in spec.stages[stage]]
        terms = [_owed(term, kernel, strengths) for term, kernel in zip(terms, kernels, strict=True)]
    terms = [term._replace(hessian=or_identity(term.hessian, n)) for term, n in zip(terms, tokens, strict=True)]
    return StageTerms(terms, tokens, out, kept)


def _room(spec: ModuleSpec, states: np.ndarray) -> list[np.ndarray] | None:
    """Arrays for what the groups of the last stage read on all rows; None where that is too much."""
    rows, length, _ = states.shape
    if not kept_bytes(spec, rows * length):
        return None
    return [np.empty((rows, length, linear.rows), np.float32) for (linear,) in spec.stages[-1]]


def kept_bytes(spec: ModuleSpec, tokens: int) -> int:
    """Bytes of what the groups of a module's last stage read; none where that is too much to keep."""
    wanted = 4 * tokens * sum(linear.rows for (linear,) in spec.stages[-1])
    return wanted if wanted <= KEPT_BYTES else 0


def finish(
    decoder: Decoder, spec: ModuleSpec, params: Any, states: np.ndarray, inputs: Sequence[np.ndarray], out: np.ndarray
) -> np.ndarray:
    """A module's output on all rows from what its last stage reads; `out` may be `states` itself."""
    params = on_all_devices(params)
    for chunk in row_chunks(states):
        chunk.put(out, _finish_chunk(decoder, spec.kind, params, chunk.take(states), tuple(map(chunk.take, inputs))))
    return out


@partial(jax.jit, static_argnums=(0, 1))
def _finish_chunk(decoder: Decoder, kind: str, params: Any, h: jax.Array, inputs: tuple[jax.Array, ...]) -> jax.Array:
    return decoder.output(kind, params, h, decoder.linears(kind, decoder.stages(kind) - 1, params, inputs))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _inputs(decoder: Decoder, kind: str, stage: int, params: Any, h: jax.Array) -> tuple[jax.Array, ...]:
    """What a stage reads, through the linears of the stages before it; the same compiled function for both streams."""
    outputs: dict[str, jax.Array] = {}
    for before in range(stage):
        outputs |= decoder.linears(kind, before, params, decoder.inputs(kind, before, params, h, outputs))
    return decoder.inputs(kind, stage, params, h, outputs)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=13)
def _add_chunk(
    decoder: Decoder,
    kind: str,
    stage: int,
    strengths: Strengths,
    routed_only: bool,
    params: Any,
    quantized: Any,
    tables: jax.Array | None,
    h: jax.Array,
    ref: jax.Array,
    mask: jax.Array,
    xs: tuple[jax.Array, ...],
    ys: tuple[jax.Array, ...],
    sums: tuple[list[CrossTerms], list[jax.Array]] | None,
) -> tuple[jax.Array, tuple[list[CrossTerms], list[jax.Array]]]:
    """A chunk's full-precision states after the module (before its last stage as they are), and the sums with what it
    adds; compiled apart from the inputs `xs` and `ys` of both streams, of which XLA would repeat parts.
    """  # noqa: D205
    weights = group_weights(decoder.routed(kind, quantized, h) if routed_only else None, len(xs), mask)
    factors = token_factors(weights, tables, ref, mask)
    if stage < decoder.stages(kind) - 1:
        hidden, new = ref, [cross_terms(x, y, f) for x, y, f in zip(xs, ys, factors, strict=True)]
    else:
        with jax.default_matmul_precision("highest"):  # most of these outputs will be taken off again
            outputs = decoder.linears(kind, stage, params, ys)
        hidden = decoder.output(kind, params, ref, outputs)
        wanted = [_without_bias(outputs[name], params[name]) for (name,) in decoder.names(kind)[stage]]
        new = [_last(x, y, ref - h, f, strengths) for x, y, f in zip(xs, wanted, factors, strict=True)]
    return hidden, added(sums, (new, [jnp.sum(w) for w in weights]))


def _without_bias(y: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
    return y - params["bias"] if "bias" in params else y


def added[T](sums: T | None, more: T) -> T:
    """Sums over the chunks so far, None before the first, and one chunk's."""
    return more if sums is None else jax.tree.map(jnp.add, sums, more)


def cross_terms(x: jax.Array, y: jax.Array | None, factor: jax.Array) -> CrossTerms:
    """Products of a chunk's inputs, quantized `x` and full-precision `y` `[B, T, K]`, each token by its `factor`.

    Without `y` there is the Hessian alone.
    """
    x = _tokens(x, factor)
    if y is None:
        return CrossTerms(gram(x))
    return CrossTerms(gram(x), cross=jnp.matmul(x.T, _tokens(y, factor) - x, precision=lax.Precision.HIGHEST))


def _last(x: jax.Array, wanted: jax.Array, error: jax.Array, factor: jax.Array, strengths: Strengths) -> CrossTerms:
    """The same for a linear that writes to the stream, whose own error is `error`, and whose output `X_f W` is
    `wanted`: the products with `a X_f W + r (h_f - h_q)`, from which `_owed` takes the share of `X_q W`.
    """  # noqa: D205
    x, target = _tokens(x, factor), strengths.inputs * wanted
    if strengths.residual:
        target = target + strengths.residual * error
    return CrossTerms(gram(x), owed=jnp.matmul(x.T, _tokens(target, factor), precision=lax.Precision.HIGHEST))


@partial(jax.jit, static_argnums=2)
def _owed(terms: CrossTerms, kernel: jax.Array, strengths: Strengths) -> CrossTerms:
    """The terms with `a X_q^T X_q W` taken off: one product of the Hessian in place of one for every token."""
    assert terms.owed is not None  # those of the last stage
    own = jnp.matmul(terms.hessian, kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return terms._replace(owed=terms.owed - strengths.inputs * own)


def _tokens(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Rows end to end, each token by its factor."""
    return (x * factor[..., None]).reshape(-1, x.shape[-1])
