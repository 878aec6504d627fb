"""Order of the rows: which come first, with the wider codes, and are made up for by those after them."""

import jax

from exl2jax.ops.hessian import descending
from exl2jax.variants.registry import NoSettings, variant


@variant("order", "stock")
def stock(diagonal: jax.Array, settings: NoSettings) -> jax.Array:
    """Act-order: rows by descending diagonal of the Hessian (the GPTQ authors' act-order; docs/format.md 2.4)."""
    return descending(diagonal)
