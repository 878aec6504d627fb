"""Operations that the passes of a conversion take, and how fast this machine does them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.conversion.config import ConversionConfig
from exl2jax.models import LinearSpec, ModelConfig, head_spec, module_specs
from exl2jax.ops.scales import TRIALS

PROBE = 1024
"""Rows and columns of the product that the machine's speed is measured with."""
PROBING = 2.0
"""Seconds that it is measured for."""

TYPICAL_ROWS, TYPICAL_LENGTH = {"measure": 19, "quantize": 115}, 2048
"""Rows and length of the built-in set, for settings that give none."""

GPTQ_EFFICIENCY = 0.15
"""Share of a matrix product's speed that the walk over rows and the scale search reach, measured on a CPU."""

SETTINGS_MEASURED = {"fisher": 7, "divergence": 7, "accuracy": 18}
PASSES = {"fisher": 5, "divergence": 5, "accuracy": 12}
"""Forward passes that a measurement is worth, backward passes and candidates included."""

MODEL_ERROR = 2.0
"""The factor by which times of whole stages were off, at most, at the speed that fits the whole (laboratory page)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Operations per second of a matrix product on this machine; `spread` is that of its probes, in parts of it."""

    operations: float
    spread: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """Seconds that something will take, and the range that they will lie in."""

    seconds: float
    least: float
    most: float


def pass_operations(config: ConversionConfig, model: ModelConfig) -> dict[str, float]:
    """Floating-point operations by pass, in order, those of GPTQ weighted by how slowly they go."""
    specs, head = module_specs(model), head_spec(model)
    linears = [linear for spec in specs for linear in spec.linears]
    weights = sum(linear.weights for linear in linears)
    hessians = sum(2 * group[0].rows ** 2 for spec in specs for group in spec.groups)
    recipe = config.recipe
    trials = TRIALS[recipe.method.search]
    walk = sum(walk_operations(x, trials) for x in linears) / GPTQ_EFFICIENCY
    measure, quantize = tokens_of(config, "measure"), tokens_of(config, "quantize")
    priced = measure * hessians + walk * SETTINGS_MEASURED[recipe.pricing]
    passes = {
        "forward": measure * 2.0 * weights,
        "backward": measure * 2.0 * weights * (PASSES[recipe.pricing] - 1),
        "perturb": measure * 2.0 * weights * len(specs) / 2,
        "price": priced,
        "measure": measure * 2.0 * weights * PASSES["accuracy"] + priced,
    }
    taken = {} if config.measurement is not None else {name: passes[name] for name in recipe.passes}
    if config.output_measurement is not None:
        return taken
    last = walk + walk_operations(head, trials) / GPTQ_EFFICIENCY
    return {**taken, "quantize": quantize * (6.0 * weights + hessians) + last}


def walk_operations(linear: LinearSpec, trials: int) -> float:
    """A product with the factor, and the scales tried on every weight at about six operations each."""
    return linear.weights * (linear.rows + trials * 6)


def tokens_of(config: ConversionConfig, stage: str) -> int:
    """Calibration tokens of the measurement or of the quantization."""
    measuring = stage == "measure"
    rows = config.measurement_rows if measuring else config.dataset_rows
    length = config.measurement_length if measuring else config.length
    return (rows or TYPICAL_ROWS[stage]) * (length or TYPICAL_LENGTH)


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
