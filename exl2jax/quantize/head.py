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
from exl2jax.quantize.propagate import CrossTerms, Strengths, added, corrected_target, cross_terms
from exl2jax.stream.chunks import full_mask, row_chunks
from exl2jax.stream.devices import on_all_devices, on_one_device
from exl2jax.variants import STOCK, Method

MAX_GPTQ_WEIGHTS = 10**9
"""Heads of more weights than this are rounded to nearest (EXL2.md section 1)."""


def quantize_head(
    decoder: Decoder,
    spec: LinearSpec,
    params: Any,
    states: np.ndarray,
    mask: np.ndarray | None,
    qparams: QParams,
    method: Method = STOCK,
    *,
    reference: np.ndarray | None = None,
    strength: float = 0.0,
) -> tuple[PackedWeight, dict[str, float], tuple[str, ...]]:
    """Quantize the head on final `states [R, T, D]`: the packed weight, the damping (none if rounded), diagnostics.

    With the full-precision `reference [R, T, D]` its target is corrected by `strength` for what these states lack
    (`exl2jax.quantize.propagate`): the head is the last that can.
    """
    kernel = params["lm_head"]["kernel"]
    if spec.weights > MAX_GPTQ_WEIGHTS:
        rows, groups = jnp.arange(spec.rows), qparams.groups(spec.rows)
        rounded = round_to_nearest(jnp.asarray(kernel), rows, groups, search=method.search)
        return pack_checked(rounded, spec, None), {}, ()
    terms = head_terms(decoder, params, states, reference if strength else None, mask)
    factor = method.factorize(terms.hessian)
    target = jnp.asarray(kernel)
    if terms.cross is not None:
        target = corrected_target(target.astype(jnp.float32), factor, terms, Strengths(strength, 0.0))
    done = quantize(target, factor, qparams, spec, method, kernel)
    (checks,) = read_checks([done.checks])
    require_sound(checks, spec, spec.key)
    linear = done.linear
    diagnostics = (*hessian_diagnostics(terms.hessian, factor, (spec,)), *linear_diagnostics(spec, kernel, linear))
    return PackedWeight(done.packed.stored(linear.groups), linear.weight), {spec.name: checks.damping}, diagnostics


def head_terms(
    decoder: Decoder, params: Any, states: np.ndarray, reference: np.ndarray | None, mask: np.ndarray | None
) -> CrossTerms:
    """`X^T X / R` of what the head reads, and with a full-precision `reference` the cross term towards it."""
    mask = full_mask(states, mask)
    norm, terms = on_all_devices({"norm": params["norm"]}), None
    for chunk in row_chunks(states):
        wanted = None if reference is None else chunk.take(reference)
        terms = _accumulate(decoder, norm, chunk.take(states), wanted, chunk.take(mask), terms)
    assert terms is not None  # there is at least one row
    return on_one_device(terms).scaled(1 / len(states))


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def _accumulate(
    decoder: Decoder, params: Any, h: jax.Array, wanted: jax.Array | None, mask: jax.Array, terms: CrossTerms | None
) -> CrossTerms:
    y = None if wanted is None else decoder.head_input(params, wanted)
    return added(terms, cross_terms(decoder.head_input(params, h), y, mask))
