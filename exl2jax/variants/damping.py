"""Damping of the Hessian: what is added to its diagonal, and what a failed factorization multiplies that by."""

import jax

from exl2jax.ops.hessian import share_of_mean
from exl2jax.variants.registry import NoSettings, variant


@variant("damping", "stock")
def stock(h: jax.Array, settings: NoSettings) -> tuple[jax.Array, float]:
    """0.12 of the mean diagonal, doubled at failure, as stock ExLlamaV2 does (docs/format.md 2.4)."""
    return share_of_mean(h)
