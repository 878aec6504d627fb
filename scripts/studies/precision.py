#!/usr/bin/env python3
"""Measure what TF32 costs in the sums over tokens, on a machine that has none.

    python -m scripts.studies.precision

TF32 keeps 10 of the 23 bits of a float32 mantissa. Every factor of the products in `exl2jax/ops/products.py` that are
float32 here (the sums over tokens for Hessians and error propagation, the full-precision outputs of a module's last
stage) loses the others, by rounding or by cutting them off; sums stay float32. Every trial measures and converts with
24 calibration rows at 3.0 bits and without tuning, and is judged as `scripts/studies/quality.py` does.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
from jax import lax

from exl2jax import ConversionConfig, ConversionResult, convert
from exl2jax.ops import products
from scripts.studies.quality import PART_BITS, PART_ROWS, Study, Trial, inputs, table

LOST = 13
"""Bits of a float32 mantissa that TF32 has not."""

type Factors = Callable[[jax.Array], jax.Array]
"""What a product makes of its factors."""


def as_they_are(x: jax.Array) -> jax.Array:
    """All bits."""
    return x


def rounded(x: jax.Array) -> jax.Array:
    """To the nearest TF32 value."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23 - LOST)


def cut(x: jax.Array) -> jax.Array:
    """To the TF32 value next to it on the side of zero."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    nearer = lax.bitcast_convert_type(bits >> LOST << LOST, jnp.float32)
    return x + lax.stop_gradient(nearer - x)  # exact, and with a gradient, which bits have not


FACTORS: dict[str, Factors] = {"float32": as_they_are, "TF32, rounded": rounded, "TF32, cut off": cut}


def converted(config: ConversionConfig, change: Factors) -> ConversionResult:
    """A conversion whose float32 factors are changed."""

    def matmul(x: jax.Array, y: jax.Array, **how: Any) -> jax.Array:
        x, y = (change(a) if a.dtype == jnp.float32 else a for a in (x, y))
        return jnp.matmul(x, y, **how)

    jax.clear_caches()  # of programs with other factors
    try:
        with patch.object(products, "jnp", SimpleNamespace(**{**vars(jnp), "matmul": matmul})):
            return convert(config)
    finally:
        jax.clear_caches()


def main() -> int:
    """Run the trials and print their table."""
    arguments = inputs(__doc__, Path("build/precision")).parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    jax.config.update("jax_compilation_cache_dir", str(arguments.out / "xla"))
    trial, records = Trial(variant="untuned best", bits=PART_BITS, rows=PART_ROWS), []
    for name, change in FACTORS.items():
        own = argparse.Namespace(**{**vars(arguments), "out": arguments.out / name.replace(", ", "-")})
        record = Study(own, partial(converted, change=change)).run(trial)
        records.append({**record, "variant": name})
        print(table(records[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
