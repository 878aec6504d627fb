"""From a measurement to the setting of every linear."""

import logging
from pathlib import Path

from exl2jax.allocate.allocate import allocate
from exl2jax.allocate.strategy import Strategy
from exl2jax.conversion.context import Context
from exl2jax.conversion.summary import WEAKER
from exl2jax.measure.measurement import Measurement, read_measurement
from exl2jax.variants.recipe import Pricing

log = logging.getLogger(__name__)


def limited_measurement(context: Context, path: Path) -> Measurement:
    """A measurement file without the settings that pins and excluded widths forbid."""
    return context.config.limits.apply(read_measurement(path, context.specs), context.specs)


def choose_strategy(context: Context, measurement: Measurement, pricing: Pricing) -> Strategy:
    """The allocation that a job takes; raises `MeasurementError` when its bits cannot be reached by `pricing`."""
    return allocate(
        measurement,
        context.specs,
        context.config.bits,
        pricing=pricing,
        solver=context.config.solver,
        seed=context.config.seed,
        objective=context.recipe.objective,
        table=context.recipe.table,
    )


def usable_pricing(context: Context, measurement: Measurement) -> Pricing:
    """The pricing of the recipe, or the other kind where the measurement has no data for it."""
    pricing = context.recipe.pricing
    if pricing != "accuracy" and measurement.sensitivity is None:
        log.warning("allocation: %s", WEAKER)
        return "accuracy"
    return "fisher" if pricing == "accuracy" and not measurement.modules else pricing
