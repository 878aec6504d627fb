"""Matrix products over many tokens: those of a forward pass, in float32 or in bfloat16, and the sums for Hessians.

On an NVIDIA GPU a float32 product has TF32 factors unless it is asked for in full: the 11 significant bits that half
precision has, in which ExLlamaV2 holds the states that it multiplies.
"""

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
        return jnp.matmul(x, w.astype(jnp.float32))
    return jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def sum_over_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
    """`X^T Y [K, N]` of `x [T, K]` and `y [T, N]` float32, the sums in float32.

    `X^T X` of rounded factors is the Gram matrix of rounded inputs, so it stays positive semidefinite. A difference of
    two streams has to be formed before the product, not after it.
    """
    return jnp.matmul(x.T, y)
