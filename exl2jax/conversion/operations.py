"""Operations of the passes of a conversion, and the speed of this machine."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.conversion.config import ConversionConfig
from exl2jax.estimate import Passes, Work, conversion_work
from exl2jax.estimate.devices import CORE
from exl2jax.models import ModelConfig
from exl2jax.ops import Products

PROBE = 1024
"""Rows and columns of the product that the machine's speed is measured with."""
PROBING = 2.0
"""Seconds that the speed is measured for."""

SLOWER = CORE["products"] / CORE["elementwise"]
"""Operations of a product that one core does in the time of one element-wise operation."""

FASTER = 2.5
"""How many times as fast a forward pass is in bfloat16 on a core with AMX: an MLP's (performance page)."""

ROUNDED = ("price", "quantize")
"""The passes whose products may be bfloat16."""

MODEL_ERROR = 2.0
"""The factor by which times of whole stages were off, at most, at the speed that fits the whole (laboratory page)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Operations per second of a matrix product on this machine; `spread` is that of its probes, in parts of it."""

    operations: float
    spread: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """Estimated seconds, and their range."""

    seconds: float
    least: float
    most: float


def pass_operations(config: ConversionConfig, model: ModelConfig) -> dict[str, float]:
    """Operations of each pass that the conversion takes, in order, in units of a matrix product's operations."""
    recipe = config.recipe
    measuring = conversion_work(model, recipe, passes_of(config, model, measure=True))
    quantizing = conversion_work(model, recipe, passes_of(config, model))
    names = () if config.measurement is not None else recipe.passes
    taken = {name: measuring[name] for name in names}
    if config.output_measurement is None:
        taken |= {name: quantizing[name] for name in recipe.quantizing_passes}
    faster = FASTER if config.precision is Products.BFLOAT16 else 1.0
    return {name: _weighted(work, faster if name in ROUNDED else 1.0) for name, work in taken.items()}


def passes_of(config: ConversionConfig, model: ModelConfig, *, measure: bool = False) -> Passes:
    """The rows of both calibrations and the length of one; those of the built-in set where the settings give none."""
    typical = Passes()
    length = config.measurement_length if measure else config.length
    return Passes(
        rows=config.dataset_rows or typical.rows,
        measurement_rows=config.measurement_rows or typical.measurement_rows,
        length=length or min(typical.length, model.max_position),
    )


def _weighted(work: Work, faster: float) -> float:
    return work.fast / faster + work.sums + work.exact + SLOWER * work.elementwise


def machine_speed(seconds: float = PROBING) -> Speed:
    """Measure this machine for some seconds: the median of the probes, and how far they lie apart."""
    x = jnp.ones((PROBE, PROBE), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    found: list[float] = []
    end = time.monotonic() + seconds
    while len(found) < 3 or time.monotonic() < end:
        start = time.monotonic()
        product(x, x).block_until_ready()
        found.append(2 * PROBE**3 / (time.monotonic() - start))
    low, middle, high = np.percentile(found, (10, 50, 90))
    return Speed(operations=float(middle), spread=float((high - low) / middle / 2))


def durations(operations: Mapping[str, float], speed: Speed) -> dict[str, Duration]:
    """Seconds of each pass, and of `all`, at a speed.

    The range is that of the model of operations, a factor of `MODEL_ERROR` either way, widened by the probes' spread.
    """
    factor = MODEL_ERROR * (1 + speed.spread)
    work = {**operations, "all": sum(operations.values())}
    found = {name: amount / speed.operations for name, amount in work.items()}
    return {name: Duration(seconds=s, least=s / factor, most=s * factor) for name, s in found.items()}
