"""Quantize and dequantize exactly as the EXL2 runtime does, in half precision.

EXL2 scales are subnormal halves for ordinary weights, so every rounding below is a real float16 conversion: a float32
formula is wrong by up to half a percent at 8 bits. Compilers may drop a float32 -> float16 -> float32 pair as "excess
precision", through its integer bits too (XLA for CUDA does); `to_half` therefore does something to the bits between.
"""

import jax
import jax.numpy as jnp
from jax import lax

HALF_MAX = 65504.0
HALF_INFINITY = 0x7C00


def to_half(x: jax.Array) -> jax.Array:
    """Round float32 to the nearest float16 (ties to even, subnormals kept) and give it back as float32.

    A NaN may come back as infinity: the bound on the bits changes nothing else, and no compiler may fold it away.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float16), jnp.int16)
    return lax.bitcast_convert_type(jnp.minimum(bits, jnp.int16(HALF_INFINITY)), jnp.float16).astype(jnp.float32)


def half_scale(qscale_max: jax.Array, qs: jax.Array) -> jax.Array:
    """Working scales `half(half(qs^2) * half(qscale_max / 256))` as float32 holding exact half values.

    `qscale_max` float16 or float32, rounded to half here, broadcast against `qs`, the 4-bit scale index 1..16
    (the stored nibble plus one). docs/format.md 1.4.
    """
    index = qs.astype(jnp.float32)
    # A cast to half right before this call may be one of those that a compiler drops.
    stored = to_half(qscale_max.astype(jnp.float32))
    maximum = to_half(stored * jnp.float32(1 / 256))
    return to_half(index * index * maximum)


def quantize(w: jax.Array, scale: jax.Array, bits: jax.Array) -> jax.Array:
    """Codes `clamp(rint(w / scale) + 2^(bits-1), 0, 2^bits - 1)` as float32; a zero scale gives the zero code."""
    zero = jnp.exp2(bits.astype(jnp.float32) - 1)
    steps = jnp.where(scale > 0, w / scale, 0.0)
    return jnp.clip(jnp.round(steps) + zero, 0.0, 2 * zero - 1)


def dequantize(codes: jax.Array, scale: jax.Array, bits: jax.Array) -> jax.Array:
    """Weights `half((code - 2^(bits-1)) * scale)` as float32 holding exact half values."""
    zero = jnp.exp2(bits.astype(jnp.float32) - 1)
    return to_half((codes.astype(jnp.float32) - zero) * scale)
