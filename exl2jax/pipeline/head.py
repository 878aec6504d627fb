"""Quantization of the language-model head: GPTQ like any linear, round to nearest where it is too large for that."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Decoder, LinearSpec
from exl2jax.ops import accumulate_hessian, round_to_nearest
from exl2jax.pipeline.linear import PackedWeight, factor_hessian, pack_checked, quantize_linear
from exl2jax.pipeline.stream import row_chunks
from exl2jax.pipeline.trouble import hessian_trouble, linear_trouble
from exl2jax.qparams import QParams
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
) -> tuple[PackedWeight, dict[str, float], tuple[str, ...]]:
    """Quantize the head on final `states [R, T, D]`: the packed weight, the damping (none if rounded), trouble."""
    kernel = params["lm_head"]["kernel"]
    if spec.weights > MAX_GPTQ_WEIGHTS:
        rows = jnp.arange(spec.rows)
        return pack_checked(round_to_nearest(jnp.asarray(kernel), rows, qparams.groups(spec.rows)), spec, None), {}, ()
    hessian = head_hessian(decoder, params, states, mask)
    factor = factor_hessian(hessian, spec.key, method)
    linear = quantize_linear(kernel, factor, qparams, spec, method)
    trouble = (*hessian_trouble(hessian, factor, (spec,)), *linear_trouble(spec, kernel, linear))
    return pack_checked(linear, spec, None), {spec.name: float(factor.damping)}, trouble


def head_hessian(decoder: Decoder, params: Any, states: np.ndarray, mask: np.ndarray | None) -> jax.Array:
    """`X^T X / R` of what the head reads."""
    mask = np.ones(states.shape[:2], np.float32) if mask is None else mask.astype(np.float32)
    total = jnp.zeros((states.shape[-1], states.shape[-1]), jnp.float32)
    for chunk in row_chunks(states):
        total = _accumulate(decoder, {"norm": params["norm"]}, chunk.take(states), chunk.take(mask), total)
    return total / states.shape[0]


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _accumulate(decoder: Decoder, params: Any, h: jax.Array, mask: jax.Array, total: jax.Array) -> jax.Array:
    return accumulate_hessian(total, decoder.head_input(params, h) * mask[:, :, None])
