"""How far a quantized result is from its reference."""

import jax
import jax.numpy as jnp
from jax import lax


def relative_frobenius(out: jax.Array, ref: jax.Array) -> jax.Array:
    """`||out - ref||_F / ||ref||_F` over the last two axes: `[..., T, D] -> [...]`."""
    axes = (-2, -1)
    return jnp.sqrt(jnp.sum(jnp.square(out - ref), axes) / jnp.sum(jnp.square(ref), axes))


def proxy_loss(h: jax.Array, error: jax.Array) -> jax.Array:
    """`tr(E^T H E)`, the expected squared output error of a linear with weight error `E [K, N]`."""
    return jnp.sum(error * jnp.matmul(h, error, precision=lax.Precision.HIGHEST))
