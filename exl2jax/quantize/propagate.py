"""Error propagation: quantize each linear for the inputs the quantized model gives it, towards full-precision outputs.

With `X_q` the inputs in the quantized model, `X_f` those in the full-precision one and `H = X_q^T X_q`, the target of a
linear is `W* = W + (H + l I)^-1 X_q^T (a (X_f - X_q) W + r (h_f - h_q))`. The term with `a` is QEP (arXiv:2504.09629);
the one with `r` is for linears that write to the residual stream: they take back part of its own error.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.models import Module, ModuleSpec
from exl2jax.ops import HessianFactor, gram, solve, sum_over_tokens
from exl2jax.stream.chunks import Chunk
from exl2jax.stream.devices import on_all_devices, on_one_device
from exl2jax.stream.forward import START, Tally, largest_of
from exl2jax.stream.hessians import group_weights, or_identity
from exl2jax.stream.streams import Rows, Stream, fold
from exl2jax.stream.token_classes import token_factors

KEPT_BYTES = 1 << 29
"""Inputs of a module's last stage that are kept in memory, so that its outputs are not computed from the start."""


class Strengths(NamedTuple):
    """`inputs` is `a`; `residual` is `r` in units of the linears that write to the residual stream."""

    inputs: float
    residual: float


class CrossTerms(NamedTuple):
    """Sums over tokens, per row of calibration: `hessian = X_q^T X_q` `[K, K]`, and products to correct the target.

    Linears of a stage before the last share `cross = X_q^T (X_f - X_q)` `[K, K]`; the one of the last stage has fewer
    columns than rows and takes `owed [K, N]`, the whole product, strengths included.
    """

    hessian: jax.Array
    cross: jax.Array | None = None
    owed: jax.Array | None = None

    def scaled(self, factor: float | jax.Array) -> "CrossTerms":
        """All sums times `factor`."""
        return jax.tree.map(lambda x: x * factor, self)


@partial(jax.jit, static_argnames="strengths")
def corrected_targets(
    kernels: Sequence[jax.Array], factor: HessianFactor, terms: CrossTerms, strengths: Strengths
) -> list[jax.Array]:
    """The weights to quantize instead of `kernels [K, N]`, which share their input; the factor's own damping is `l`."""
    wide = [kernel.astype(jnp.float32) for kernel in kernels]
    if terms.owed is not None:
        (kernel,) = wide  # linears of the last stage share nothing
        return [kernel + solve(factor, terms.owed)]
    assert terms.cross is not None  # one of them always is
    correction = solve(factor, strengths.inputs * terms.cross)
    return [kernel + jnp.matmul(correction, kernel, precision=lax.Precision.HIGHEST) for kernel in wide]


class StageTask(NamedTuple):
    """One stage of a module to quantize.

    `params` are the full-precision ones, `quantized` those with the stages before quantized; `states` are those of the
    quantized model, `reference` the full-precision ones. `tables [groups of the stage, CLASSES]` weigh the tokens by
    class (`exl2jax.stream.token_classes`), in all terms. An expert's tokens are those that the quantized model routes
    to it, unless not `routed_only`; without any its Hessian is the identity.
    """

    module: Module
    spec: ModuleSpec
    stage: int
    params: Any
    quantized: Any
    rows: Rows
    states: Stream
    reference: Stream
    strengths: Strengths
    routed_only: bool = True
    tables: np.ndarray | None = None

    @property
    def last(self) -> bool:
        """Whether this is the last stage, whose linears write to the residual stream."""
        return self.stage == self.module.last


class StageTerms(NamedTuple):
    """Cross terms of each group of a stage, the tokens that went into them, and the tally of the stages before it.

    `inputs` are those of the last stage's groups in the quantized model, `[R, T, K]`, None where they are not kept.
    """

    terms: list[CrossTerms]
    tokens: list[jax.Array]
    tally: Tally
    inputs: list[Stream] | None = None


class StageSums(NamedTuple):
    """Sums over the chunks of a stage so far."""

    terms: list[CrossTerms]
    tokens: list[jax.Array]
    tally: Tally


def stage_terms(task: StageTask, into: Stream | None = None) -> StageTerms:
    """Cross terms of a stage, whose inputs come through the stages before: quantized ones, and full-precision ones.

    The last stage puts the module's full-precision output `into` a stream, which may be the reference itself, and keeps
    its inputs if they take `KEPT_BYTES` at most.
    """
    kept = _room(task) if task.last else None
    how = _How(task.module, task.stage, task.strengths, task.routed_only)
    params, quantized, tables = on_all_devices((task.params, task.quantized, task.tables))
    sums = on_all_devices(_zeros(how, tuple((g[0].rows, g[0].columns) for g in task.spec.stages[task.stage])))

    def program(
        sums: StageSums, h: jax.Array, ref: jax.Array, mask: jax.Array
    ) -> tuple[StageSums, tuple[jax.Array, ...]]:
        xs, peak = _inputs(task.module, task.stage, quantized, h)
        ys, _ = _inputs(task.module, task.stage, params, ref)
        hidden, sums = _add_chunk(how, (params, quantized), tables, Chunk(h, mask, ref), (xs, ys), peak, sums)
        return sums, (*(() if into is None else (hidden,)), *(xs if kept else ()))

    outputs = (*(() if into is None else (into,)), *(kept or ()))
    sums = on_one_device(fold(program, sums, (task.states, task.reference, task.rows.mask), outputs))
    kernels = [task.params[group[0].name]["kernel"] for group in task.spec.stages[task.stage]] if task.last else None
    share = np.float32(1 / task.states.count)
    return StageTerms(_means(sums.terms, sums.tokens, kernels, share, task.strengths), *sums[1:], kept)


def _room(task: StageTask) -> list[Stream] | None:
    """Streams for the inputs of the last stage's groups on all rows; None where these take too much."""
    length = task.states.shape[0]
    if not kept_bytes(task.spec, task.states.count * length):
        return None
    return [task.states.like(length, linear.rows) for (linear,) in task.spec.stages[-1]]


def kept_bytes(spec: ModuleSpec, tokens: int) -> int:
    """Bytes of the inputs of a module's last stage; none where they are too many to keep."""
    wanted = 4 * tokens * sum(linear.rows for (linear,) in spec.stages[-1])
    return wanted if wanted <= KEPT_BYTES else 0


def finish(
    module: Module, params: Any, states: Stream, inputs: Sequence[Stream], into: Stream, tally: Tally = START
) -> Tally:
    """A module's output on all rows from the inputs of its last stage; `into` may be `states` itself.

    `tally` is that of the stages before.
    """
    return fold(partial(_finish_chunk, module, on_all_devices(params)), tally, (states, *inputs), (into,))


@partial(jax.jit, static_argnames="module")
def _finish_chunk(
    module: Module, params: Any, tally: Tally, h: jax.Array, *inputs: jax.Array
) -> tuple[Tally, tuple[jax.Array]]:
    outputs = module.linears(module.last, params, inputs)
    hidden = module.output(params, h, outputs)
    return tally.with_states(hidden).with_linears(outputs), (hidden,)


@partial(jax.jit, static_argnames=("module", "stage"))
def _inputs(module: Module, stage: int, params: Any, h: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Inputs of a stage, and the largest output of the linears before it; one compiled function for both streams."""
    inputs, outputs = module.inputs_through(stage, params, h)
    return inputs, largest_of(outputs)


class _How(NamedTuple):
    """The static side of a stage's sums."""

    module: Module
    stage: int
    strengths: Strengths
    routed_only: bool


@partial(jax.jit, static_argnames=("how", "shapes"))
def _zeros(how: _How, shapes: tuple[tuple[int, int], ...]) -> StageSums:
    """Sums before the first chunk; `shapes` are those of the first linear of each group."""
    last = how.stage == how.module.last
    terms = [
        CrossTerms(jnp.zeros((k, k)), owed=jnp.zeros((k, n))) if last else CrossTerms(*(jnp.zeros((k, k)),) * 2)
        for k, n in shapes
    ]
    return StageSums(terms, [jnp.float32(0)] * len(shapes), jax.tree.map(jnp.asarray, START))


@partial(jax.jit, static_argnames="how", donate_argnames="sums")
def _add_chunk(
    how: _How,
    params: tuple[Any, Any],
    tables: jax.Array | None,
    chunk: Chunk,
    inputs: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]],
    peak: jax.Array,
    sums: StageSums,
) -> tuple[jax.Array, StageSums]:
    """A chunk's full-precision states after the module (before its last stage as they are), and the sums with it added.

    `params` and `inputs` are those of the full-precision and of the quantized stream; compiled apart from the inputs,
    since XLA would repeat parts of them here.
    """
    (full, quantized), (xs, ys), (module, stage, strengths, _) = params, inputs, how
    h, mask, ref = chunk
    assert ref is not None  # propagation carries both streams
    weights = group_weights(module.routed(quantized, h) if how.routed_only else None, len(xs), mask)
    factors = token_factors(weights, tables, ref, mask)
    if stage < module.last:
        hidden, new = ref, [cross_terms(x, y, f) for x, y, f in zip(xs, ys, factors, strict=True)]
    else:
        outputs = module.exact.linears(stage, full, ys)  # most of them will be taken off again
        hidden = module.output(full, ref, outputs)
        wanted = [_without_bias(outputs[name], full[name]) for (name,) in module.stages[stage]]
        new = [_last(x, y, ref - h, f, strengths) for x, y, f in zip(xs, wanted, factors, strict=True)]
    tokens = [n + jnp.sum(w) for n, w in zip(sums.tokens, weights, strict=True)]
    tally = sums.tally._replace(linear=jnp.maximum(sums.tally.linear, peak))
    return hidden, StageSums(jax.tree.map(jnp.add, sums.terms, new), tokens, tally)


def _without_bias(y: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
    return y - params["bias"] if "bias" in params else y


def cross_terms(x: jax.Array, y: jax.Array | None, factor: jax.Array) -> CrossTerms:
    """Products of a chunk's inputs, quantized `x` and full-precision `y` `[B, T, K]`, each token by its `factor`.

    Without `y` there is the Hessian alone.
    """
    x = _tokens(x, factor)
    if y is None:
        return CrossTerms(gram(x))
    return CrossTerms(gram(x), cross=sum_over_tokens(x, _tokens(y, factor) - x))


def _last(x: jax.Array, wanted: jax.Array, error: jax.Array, factor: jax.Array, strengths: Strengths) -> CrossTerms:
    """The same for a linear that writes to the stream, whose own error is `error`, and whose output `X_f W` is
    `wanted`: the products with `a X_f W + r (h_f - h_q)`, from which `_owed` takes the share of `X_q W`.
    """  # noqa: D205
    x, target = _tokens(x, factor), strengths.inputs * wanted
    if strengths.residual:
        target = target + strengths.residual * error
    return CrossTerms(gram(x), owed=sum_over_tokens(x, _tokens(target, factor)))


@partial(jax.jit, static_argnames="strengths", donate_argnames="terms")
def _means(
    terms: list[CrossTerms],
    tokens: list[jax.Array],
    kernels: list[jax.Array] | None,
    share: jax.Array,
    strengths: Strengths,
) -> list[CrossTerms]:
    """Terms per row of calibration from sums; `kernels` are those of the last stage, whose own outputs come off."""
    terms = [term.scaled(share) for term in terms]
    if kernels is not None:
        terms = [_owed(term, kernel, strengths) for term, kernel in zip(terms, kernels, strict=True)]
    return [term._replace(hessian=or_identity(term.hessian, n)) for term, n in zip(terms, tokens, strict=True)]


def _owed(terms: CrossTerms, kernel: jax.Array, strengths: Strengths) -> CrossTerms:
    """The terms with `a X_q^T X_q W` taken off: one product of the Hessian in place of one for every token."""
    assert terms.owed is not None  # those of the last stage
    own = jnp.matmul(terms.hessian, kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return terms._replace(owed=terms.owed - strengths.inputs * own)


def _tokens(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Rows end to end, each token by its factor."""
    return (x * factor[..., None]).reshape(-1, x.shape[-1])
