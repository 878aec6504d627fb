"""Quantization of the language-model head: GPTQ like any linear, round to nearest where it is too large for that."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Decoder, LinearSpec
from exl2jax.ops import round_to_nearest
from exl2jax.qparams import QParams
from exl2jax.quantize.diagnostics import hessian_diagnostics, linear_diagnostics
from exl2jax.quantize.linear import PackedWeight, pack_checked, quantize, read_checks, require_sound
from exl2jax.quantize.propagate import CrossTerms, Strengths, corrected_targets, cross_terms
from exl2jax.stream.devices import on_all_devices, on_one_device
from exl2jax.stream.streams import Rows, Stream, fold, read
from exl2jax.variants import STOCK, Quantizer

MAX_GPTQ_WEIGHTS = 10**9
"""Heads of more weights than this are rounded to nearest (docs/format.md 1.8)."""


def quantize_head(
    decoder: Decoder,
    spec: LinearSpec,
    params: Any,
    places: Rows,
    states: Stream,
    qparams: QParams,
    quantizer: Quantizer = STOCK,
    *,
    reference: Stream | None = None,
    strength: float = 0.0,
) -> tuple[PackedWeight, dict[str, float], tuple[str, ...]]:
    """Quantize the head on its final states: the packed weight, the damping (none if rounded), diagnostics.

    With the full-precision `reference` its target is corrected by `strength` for the error of these states
    (`exl2jax.quantize.propagate`): no module after the head can make up for it.
    """
    kernel = params["lm_head"]["kernel"]
    if spec.weights > MAX_GPTQ_WEIGHTS:
        rows, groups = jnp.arange(spec.rows), qparams.groups(spec.rows)
        rounded = round_to_nearest(jnp.asarray(kernel, jnp.float32), rows, groups, search=quantizer.search)
        return pack_checked(rounded, spec, None), {}, ()
    terms = head_terms(decoder, params, places, states, reference if strength else None)
    factor, target = quantizer.factorize(terms.hessian), kernel
    if terms.cross is not None:
        (target,) = corrected_targets((target,), factor, terms, Strengths(strength, 0.0))
    done = quantize(target, factor, qparams, spec, quantizer, kernel)
    (checks,) = read_checks([done.checks])
    require_sound(checks, spec, spec.key)
    diagnostics = (*hessian_diagnostics(checks, (spec,)), *linear_diagnostics(spec, checks))
    packed = read(done.packed).stored(done.linear.groups)
    return PackedWeight(packed, done.linear.weight), {spec.name: checks.damping}, diagnostics


def head_terms(decoder: Decoder, params: Any, rows: Rows, states: Stream, reference: Stream | None) -> CrossTerms:
    """`X^T X / R` of the head's input, and with a full-precision `reference` the cross term towards it."""
    norm, size = on_all_devices({"norm": params["norm"]}), params["lm_head"]["kernel"].shape[0]
    zeros = on_all_devices(_zeros(size, reference is not None))
    streams = (states, rows.mask) if reference is None else (states, rows.mask, reference)
    terms = fold(partial(_accumulate, decoder, norm), zeros, streams, ())
    return _scaled(on_one_device(terms), np.float32(1 / states.count))


@partial(jax.jit, static_argnames=("size", "cross"))
def _zeros(size: int, cross: bool) -> CrossTerms:
    return CrossTerms(*(jnp.zeros((size, size)) for _ in range(1 + cross)))


@partial(jax.jit, donate_argnames="terms")
def _scaled(terms: CrossTerms, factor: jax.Array) -> CrossTerms:
    return terms.scaled(factor)


@partial(jax.jit, static_argnames="decoder", donate_argnames="terms")
def _accumulate(
    decoder: Decoder, params: Any, terms: CrossTerms, h: jax.Array, mask: jax.Array, wanted: jax.Array | None = None
) -> tuple[CrossTerms, tuple[()]]:
    y = None if wanted is None else decoder.head_input(params, wanted)
    return jax.tree.map(jnp.add, terms, cross_terms(decoder.head_input(params, h), y, mask)), ()
