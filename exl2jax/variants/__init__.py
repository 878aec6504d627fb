"""Variants: the algorithm's choices as registered functions, the package's own and those of anybody's Python file.

A variant is a function with a name, a docstring that gives its source, and a frozen configuration. `variant` registers
one, `choose` names one with settings, `Quantizer` is what the pipeline quantizes a linear with.
Those that did not help are in `exl2jax.contrib`.
"""

from exl2jax.variants import (  # they register themselves
    candidates,
    damping,
    measures,
    objective,
    order,
    rounding,
    scale_searches,
    solvers,
    transforms,
    tuning,
)
from exl2jax.variants.plugins import load_entry_points, load_plugin
from exl2jax.variants.quantizer import STOCK, Quantizer
from exl2jax.variants.registry import KINDS, Choice, NoSettings, Variant, choose, find, names, variant

__all__ = [
    "KINDS",
    "STOCK",
    "Choice",
    "NoSettings",
    "Quantizer",
    "Variant",
    "candidates",
    "choose",
    "damping",
    "find",
    "load_entry_points",
    "load_plugin",
    "measures",
    "names",
    "objective",
    "order",
    "rounding",
    "scale_searches",
    "solvers",
    "transforms",
    "tuning",
    "variant",
]
