"""Variants that did not help, or were not shown to, by docs/quality.md; chosen by name like any other.

Each says in a line what it measured. They use what a plugin uses and nothing else, so that they are examples to copy.
Figures are the KL divergence at three bits on held-out web text and code beside that of `best` in the same run.
"""

from exl2jax.contrib import damping, orders, roundings, scale_searches, transforms, tuning

__all__ = ["damping", "orders", "roundings", "scale_searches", "transforms", "tuning"]
