"""Matrix products of a forward pass, in float32 or in bfloat16."""

from enum import StrEnum
from pathlib import Path

import jax
import jax.numpy as jnp


class Products(StrEnum):
    """The precision of the products of linears: their inputs are rounded to `BFLOAT16`, sums stay in float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


PROCESSOR = Path("/proc/cpuinfo")
"""Linux lists what the processor can do here."""

_FAST = "amx_bf16"
"""Flag of processors that multiply matrices of bfloat16 several times as fast as those of float32."""


def natural_products() -> Products:
    """The products that the default device is made for: bfloat16 on a processor with AMX, else float32.

    On a GPU float32 stands for the device's default precision, which is TF32 on NVIDIA's.
    """
    if jax.default_backend() != "cpu" or not PROCESSOR.exists():
        return Products.FLOAT32
    flags = PROCESSOR.read_text(encoding="utf-8", errors="replace")
    return Products.BFLOAT16 if _FAST in flags.split() else Products.FLOAT32


def product(x: jax.Array, w: jax.Array, products: Products) -> jax.Array:
    """`x W [..., N]` in float32 of `x [..., K]` float32 and `w [K, N]` of any float type."""
    if products is Products.FLOAT32:
        return x @ w.astype(jnp.float32)
    return jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
