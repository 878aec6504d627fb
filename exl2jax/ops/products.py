"""Matrix products of a forward pass, in float32 or in bfloat16."""

from enum import StrEnum

import jax
import jax.numpy as jnp


class Products(StrEnum):
    """The precision of the products of linears: both factors are rounded to `BFLOAT16`, sums stay in float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def product(x: jax.Array, w: jax.Array, products: Products) -> jax.Array:
    """`x W [..., N]` in float32 of `x [..., K]` float32 and `w [K, N]` of any float type."""
    if products is Products.FLOAT32:
        return x @ w.astype(jnp.float32)
    return jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
