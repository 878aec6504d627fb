"""The small Flax modules that sublayers are made of: norms, linears, activation functions."""

from collections.abc import Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from exl2jax.ops import Products, product

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}
"""By the names of published configs; where a Gemma says `gelu`, its tanh approximation is meant."""


class Norm(nn.Module):
    """Norm over the last axis with a learned weight of `shape`: `rms`, or `layer`, which subtracts the mean first."""

    kind: str
    shape: tuple[int, ...]
    eps: float
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of `x [..., *shape]`."""
        weight = self.param("weight", nn.initializers.ones, self.shape)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        y = x * lax.rsqrt(variance + self.eps) * weight
        return y + self.param("bias", nn.initializers.zeros, self.shape) if self.bias else y


class Linear(nn.Module):
    """`x W + b` with `W [K, N]`, computed in float32 whatever the stored dtype."""

    columns: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `x [..., K]` to `[..., N]`."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.columns))
        y = product(x, kernel, Products.FLOAT32)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.columns,))
        return y


def apply_linear(params: Mapping[str, jax.Array], x: jax.Array, products: Products = Products.FLOAT32) -> jax.Array:
    """`x W + b` in float32 of `{"kernel" [K, N], "bias" [N]?}`, whatever the stored dtype."""
    y = product(x, params["kernel"], products)
    return y + params["bias"] if "bias" in params else y


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(x / cap)`, or `x` itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
