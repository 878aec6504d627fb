"""A linear quantized and checked at once."""

import numpy as np

from exl2jax.models import LinearSpec
from exl2jax.ops import HessianFactor, QuantizedLinear
from exl2jax.qparams import QParams
from exl2jax.quantize.linear import quantize, read_checks, require_sound


def quantize_soundly(kernel: np.ndarray, factor: HessianFactor, qparams: QParams, spec: LinearSpec) -> QuantizedLinear:
    """The quantized weight `[K, N]`; raises what `require_sound` does."""
    done = quantize(kernel, factor, qparams, spec)
    require_sound(read_checks([done.checks])[0], spec, spec.key)
    return done.linear
