"""Memory and time of a conversion on a named device: the counted work over the device's published rates."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from exl2jax.estimate.devices import Device
from exl2jax.estimate.passes import Passes, conversion_work, priced
from exl2jax.estimate.work import Work
from exl2jax.models import LinearSpec, ModelConfig, ModuleSpec, head_spec, module_specs
from exl2jax.ops.columns import block_columns
from exl2jax.ops.fused import FEW_BLOCKS, TILE
from exl2jax.ops.kernels import BLOCKS, PANEL
from exl2jax.quantize.outputs import feeds_columns
from exl2jax.stream.blocks import cut
from exl2jax.stream.streams import SHARE
from exl2jax.variants.recipe import Recipe

FLOAT, STORED = 4, 2
"""Bytes of a weight in computing, and as it is read."""

LAUNCH = 12e-6
"""Seconds that a launch takes where the device does next to nothing: an H200's GPTQ times over its launches."""

PER_GROUP, PER_PANEL, PER_TAKE_UP = 9, 17, 5
"""Launches of the kernels' walks for a group, for a panel, and for every panel before it: within 7 % of what XLA's text
of the walks that price 4096x4096 and 11008x4096 holds when they are compiled for an H100."""

PER_FUSED_GROUP, PER_TILE = 15, 3
"""Launches where there are no kernels for a group, and for each of its tiles of rows: within 3 % of the same for an RTX
4090."""

PER_BLOCK = 5
"""Launches of a block of columns in a group: a product, the kernel, three results put in place. Not seen compiled."""

TYPICAL_GROUP = 128
"""Rows of a group in the quantization, where the strategy is not known yet."""

CHUNK = 2048
"""Tokens of a chunk of states, whose activations are on the device together."""

HELD = 4 * FLOAT + 1 + 2
"""Bytes that GPTQ holds of a weight: itself, its target, both in walking order, its error; its code; the result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceEstimate:
    """A conversion on a device, counted and not measured.

    `memory` is what it takes beside the streams of hidden states, `streams` what these take; where both do not fit
    together, the streams cross the bus for every module. `seconds` are those of every part at published rates,
    `bound` is the part that takes longest, `total` counts the bus only where it takes longer than all the rest.
    Compiling, reading and writing files are not in it.
    """

    device: str
    memory: int
    memory_present: int
    streams: int
    streams_fit: bool
    fits: bool
    launches: int
    bytes_up: int
    work: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]
    total: float
    bound: str

    def to_json(self) -> dict[str, Any]:
        """The estimate as a JSON object."""
        return asdict(self)


def device_estimate(config: ModelConfig, recipe: Recipe, passes: Passes, device: Device) -> DeviceEstimate:
    """Count a conversion and divide by the rates of a device."""
    work = conversion_work(config, recipe, passes)
    whole = sum(work.values(), Work())
    tuned = _tuned_bytes(config, recipe)
    kept = tuned if tuned <= SHARE * device.memory else 0
    memory, streams = max(device_memory(config, recipe), kept), _streams(config, recipe, passes)
    fits_with = memory + streams <= device.memory
    launches = conversion_launches(config, recipe, device) if device.launches else 0
    again = 0 if kept else 2 * tuned * recipe.tuned_steps
    up = bytes_up(config, recipe) + again + (0 if fits_with else _stream_bytes(config, recipe, passes))
    seconds = {
        "products, default precision": (whole.fast + whole.sums) / device.fast,
        "products, float32": whole.exact / device.exact,
        "element-wise": whole.elementwise / device.elementwise,
        "launches": launches * LAUNCH,
        "bus": up / device.bus,
    }
    computing = sum(value for name, value in seconds.items() if name != "bus")
    return DeviceEstimate(
        device=device.title,
        memory=memory,
        memory_present=int(device.memory),
        streams=streams,
        streams_fit=fits_with,
        fits=memory <= device.memory,
        launches=launches,
        bytes_up=up,
        work={name: each._asdict() for name, each in work.items()},
        seconds=seconds,
        total=max(computing, seconds["bus"]),
        bound=max(seconds, key=lambda name: seconds[name]),
    )


def device_memory(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of the largest piece that is worked on at a time, states of a chunk included, streams apart.

    Its weights in float32 beside those of the next as they are read; Hessian, cross product and factor of every group,
    and as many squares for the outputs of linears whose errors are fed from column to column; what GPTQ holds of the
    largest linear; the activations of a chunk. The head counts as a piece.
    """
    pieces = [piece for spec in module_specs(config) for piece in cut(spec)]
    head = head_spec(config)
    return max(*(_piece_bytes(piece, fed=recipe.output_rows > 0) for piece in pieces), (STORED + HELD) * head.weights)


def _piece_bytes(piece: ModuleSpec, *, fed: bool) -> int:
    weights = (FLOAT + STORED) * piece.weights
    sides = [group[0].rows for group in piece.groups]
    sides += [linear.columns for linear in piece.linears if fed and feeds_columns(linear)]
    squares = 3 * FLOAT * sum(side**2 for side in sides)
    largest = HELD * max(linear.weights for linear in piece.linears)
    chunk = FLOAT * CHUNK * sum(linear.rows + linear.columns for linear in piece.linears)
    return weights + squares + largest + 2 * chunk


def _streams(config: ModelConfig, recipe: Recipe, passes: Passes) -> int:
    """Bytes of the quantization's hidden states, the full-precision ones among them where they are carried."""
    return (2 if recipe.carries_reference else 1) * FLOAT * passes.rows * passes.length * config.hidden_size


def bytes_up(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of weights that go up: those of every module once a pass."""
    weights = sum(spec.weights for spec in module_specs(config)) + head_spec(config).weights
    return STORED * weights * len((*recipe.passes, *recipe.quantizing_passes))


def _tuned_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of the weights that a tuning of the whole model runs forward and back in every step."""
    return STORED * sum(spec.weights for spec in module_specs(config)) if recipe.tuned_steps else 0


def _stream_bytes(config: ModelConfig, recipe: Recipe, passes: Passes) -> int:
    """Bytes of hidden states that cross the bus where they do not stay: up once and back once for every piece."""
    pieces = sum(len(cut(spec)) for spec in module_specs(config))
    return 2 * pieces * _streams(config, recipe, passes)


def conversion_launches(config: ModelConfig, recipe: Recipe, device: Device) -> int:
    """Launches of the walks of GPTQ, which are all but a few of a conversion's."""
    found = sum(gptq_launches(linear, size, kernels=device.kernels) for linear, size in _walks(config, recipe))
    return found + sum(feedback_launches(linear, kernels=device.kernels) for linear in _fed(config, recipe))


def feedback_launches(linear: LinearSpec, *, kernels: bool) -> int:
    """Launches that a walk takes beside its own where errors are fed from block to block of its columns."""
    most = BLOCKS if kernels else FEW_BLOCKS
    blocks, groups = -(-linear.columns // block_columns(linear.columns, most)), -(-linear.rows // TYPICAL_GROUP)
    return blocks * groups * PER_BLOCK + (0 if kernels else (blocks - 1) * PER_TILE * (linear.rows // TILE))


def _fed(config: ModelConfig, recipe: Recipe) -> list[LinearSpec]:
    """The linears whose errors are fed from column to column."""
    linears = (linear for spec in module_specs(config) for linear in spec.linears)
    return [linear for linear in linears if feeds_columns(linear)] if recipe.output_rows else []


def _walks(config: ModelConfig, recipe: Recipe) -> Iterator[tuple[LinearSpec, int]]:
    """Every walk with the size of its groups; widths of one size are priced side by side."""
    for spec in module_specs(config):
        if "price" in recipe.passes:
            yield from dict.fromkeys(priced(spec))
        yield from ((linear, TYPICAL_GROUP) for linear in spec.linears)
    yield head_spec(config), TYPICAL_GROUP


def gptq_launches(linear: LinearSpec, size: int, *, kernels: bool) -> int:
    """Launches of one walk: those of every group and panel, and without the kernels of every tile of rows."""
    groups, panels = (-(-linear.rows // part) for part in (size, PANEL))
    inside = PER_GROUP * groups if kernels else PER_FUSED_GROUP * groups + PER_TILE * (linear.rows // TILE)
    return inside + PER_PANEL * panels + PER_TAKE_UP * panels * (panels - 1) // 2
