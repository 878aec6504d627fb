"""Several sizes of one model: one measurement, one work directory with a folder for each size."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exl2jax.allocate.allocate import feasible_bpw
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.context import Context
from exl2jax.conversion.convert import convert
from exl2jax.conversion.operations import pass_operations
from exl2jax.conversion.preflight import exact_size
from exl2jax.conversion.result import ConversionResult
from exl2jax.conversion.strategy import choose_strategy, limited_measurement, usable_pricing
from exl2jax.errors import MeasurementError, SettingsError
from exl2jax.models import read_config
from exl2jax.qparams import FORMAT_BITS
from exl2jax.storage.hub_cache import cached_source
from exl2jax.stream.progress import Progress, RunControl

MEASURED = "measurement.json"
MEASURING = "measurement of all sizes"
STEPS = 1000
"""Bits that fit a file size are searched in steps of a thousandth."""
TRIES_BY_SLOPE = 6
"""Tries by the slope of sizes, before what is left is halved."""

UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A size to make: bits per weight, or the most bytes that the weight files may have, and the head's bits."""

    head_bits: int
    bits: float | None = None
    most_bytes: int | None = None

    @property
    def asked(self) -> str:
        """The size in the user's words."""
        return f"{self.bits:g} bits" if self.bits is not None else f"{(self.most_bytes or 0) / 1e9:g} GB"


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeOutcome:
    """The outcome of a size: its settings and result, or the reason of its refusal."""

    size: Size
    config: ConversionConfig | None = None
    result: ConversionResult | None = None
    refused: str = ""


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `5.5GB`; `SettingsError` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG]I?B)", text.strip().upper())
    if found is None or not float(found[1]):
        raise SettingsError(f"`size` is {text!r}; a size is a number with MB, GB, MiB or GiB, such as 5.5GB")
    return int(float(found[1]) * UNITS[found[2]])


def convert_sizes(
    base: ConversionConfig,
    sizes: Sequence[Size],
    control: RunControl,
    finished: Callable[[ConversionConfig, ConversionResult], None] = lambda config, result: None,
) -> list[SizeOutcome]:
    """Make every size of `sizes`; a size that cannot be reached is refused, and the others still run.

    `base.compile_full` may hold `{name}`, `{bits}` and `{head_bits}`. `finished` is called after each size. Raises what
    `convert` raises for everything but the size itself.
    """
    check_sizes(base, sizes)
    measured = _measure(base, control) if base.measurement is None else base.measurement
    outcomes: list[SizeOutcome] = []
    for number, size in enumerate(sizes, start=1):
        try:
            bits = size.bits if size.bits is not None else bits_within(base, measured, size)
            config = of_size(base, bits, size.head_bits, measured)
            made = [each.config.out_dir for each in outcomes if each.config]
            if config.out_dir in made:
                raise MeasurementError(f"{size.asked} comes to {bits:g} bits, which another size has already")
            result = convert(config, labelled(control, _number(number, len(sizes))))
        except MeasurementError as e:
            outcomes.append(SizeOutcome(size=size, refused=str(e)))
            continue
        finished(config, result)
        outcomes.append(SizeOutcome(size=size, config=config, result=result))
    return outcomes


def check_sizes(base: ConversionConfig, sizes: Sequence[Size]) -> None:
    """Raise `SettingsError` for sizes out of range, or that could not be told apart, before anything runs."""
    known = [s for s in sizes if s.bits is not None]
    for size in known:
        replace(base, bits=size.bits, head_bits=size.head_bits)
    require_distinct(base, [(s.bits or 0.0, s.head_bits) for s in known], several=len(sizes) > 1)


def set_operations(base: ConversionConfig, sizes: Sequence[Size]) -> dict[str, float]:
    """Operations of every stage of a set, by the names under which its progress reports them."""
    model, _, _ = read_config(base.in_dir)
    work = {}
    if base.measurement is None:
        passes = pass_operations(replace(base, output_measurement=base.out_dir / MEASURED, compile_full=None), model)
        work = {f"{MEASURING}, {name}": amount for name, amount in passes.items()}
    passes = pass_operations(replace(base, output_measurement=None), model)
    of_size = {name: passes[name] for name in base.recipe.quantizing_passes}
    numbers = [_number(i, len(sizes)) for i in range(1, len(sizes) + 1)]
    return work | {f"{number}, {name}": amount for number in numbers for name, amount in of_size.items()}


def of_size(base: ConversionConfig, bits: float, head_bits: int, measured: Path) -> ConversionConfig:
    """The conversion of one size, in a folder of its own of the work directory."""
    return with_target(
        replace(
            base, out_dir=base.out_dir / _folder(bits, head_bits), bits=bits, head_bits=head_bits, measurement=measured
        )
    )


def with_target(config: ConversionConfig) -> ConversionConfig:
    """The conversion with `{name}`, `{bits}` and `{head_bits}` of its `compile_full` filled in."""
    if config.compile_full is None:
        return config
    return replace(config, compile_full=Path(_filled(config, str(config.compile_full), config.bits, config.head_bits)))


def require_distinct(base: ConversionConfig, sizes: Sequence[tuple[float, int]], *, several: bool) -> None:
    """Refuse sizes that are given twice, and a `compile_full` that would put several into one directory."""
    twice = next((size for size in sizes if sizes.count(size) > 1), None)
    if twice is not None:
        raise SettingsError(f"the size of {twice[0]:g} bits with a head of {twice[1]} is given twice")
    if not several or base.compile_full is None:
        return
    target = str(base.compile_full)
    filled = {_filled(base, target, *size) for size in sizes}
    if "{bits}" not in target and (len(filled) < len(sizes) or not sizes):
        raise SettingsError(f"`compile_full` is {target}; with several sizes it must hold {{bits}}")


def bits_within(base: ConversionConfig, measured: Path, size: Size) -> float:
    """The most bits per weight, in thousandths, whose weight files have at most the bytes of `size`.

    Everything is counted: embedding, norms, head, biases and the headers of the shards. Raises `MeasurementError`,
    naming the least that can be reached.
    """
    most = size.most_bytes or 0
    config = replace(base, measurement=measured, head_bits=size.head_bits, compile_full=None, bits=FORMAT_BITS[0])
    opened = Context.open(config, RunControl())
    measurement = limited_measurement(opened, measured)
    pricing = usable_pricing(opened, measurement)

    def bytes_at(step: int) -> int:
        context = replace(opened, config=replace(config, bits=step / STEPS))
        return exact_size(context, choose_strategy(context, measurement, pricing))

    least, _ = feasible_bpw(measurement, opened.specs, pricing, opened.recipe.table)
    low, high = (min(math.ceil(bits * STEPS), FORMAT_BITS[-1] * STEPS) for bits in (least, FORMAT_BITS[-1]))
    slope = sum(spec.weights for spec in opened.specs) / (8 * STEPS)
    found = largest_step(bytes_at, low, high, most, slope)
    if found is None:
        raise MeasurementError(
            f"{most / 1e9:g} GB cannot be reached: the smallest that this model comes to is {bytes_at(low) / 1e9:.4g} "
            "GB; ask for more, or for fewer bits of the head"
        )
    return found / STEPS


def largest_step(size_of: Callable[[int], int], low: int, high: int, most: int, slope: float) -> int | None:
    """The largest step from `low` to `high` whose size is at most `most`; None where not even `low` fits.

    Sizes never fall, and rise by about `slope` a step: the first tries go by the slope from the try before, and those
    after them halve what is left.
    """
    fits, beyond = low - 1, high + 1  # everything up to `fits` fits, nothing from `beyond` on
    step, tries = (low + high) // 2, 0
    while beyond - fits > 1:
        size = size_of(step)
        fits, beyond = (step, beyond) if size <= most else (fits, step)
        tries += 1
        by_slope = step + math.floor((most - size) / slope)
        step = min(max(by_slope, fits + 1), beyond - 1) if tries < TRIES_BY_SLOPE else (fits + beyond) // 2
    return fits if fits >= low else None


def _measure(base: ConversionConfig, control: RunControl) -> Path:
    """The measurement of the set, made once in a folder of its own."""
    target = base.out_dir / MEASURED
    job = replace(base, out_dir=base.out_dir / "measure", output_measurement=target, compile_full=None)
    convert(job, labelled(control, MEASURING))
    return target


def _number(number: int, count: int) -> str:
    return f"size {number} of {count}"


def _folder(bits: float, head_bits: int) -> str:
    return f"{bits:g}bpw-h{head_bits}"


def _filled(base: ConversionConfig, target: str, bits: float, head_bits: int) -> str:
    name = (cached_source(base.in_dir) or base.in_dir.absolute().name).partition("@")[0].rpartition("/")[2]
    return target.replace("{name}", name).replace("{bits}", f"{bits:g}").replace("{head_bits}", str(head_bits))


def labelled(control: RunControl, label: str) -> RunControl:
    """The control with every stage's name after a label."""
    return replace(control, progress=_Labelled(control.progress, label))


class _Labelled:
    """Another progress, with a label before the names of stages."""

    def __init__(self, inner: Progress, label: str) -> None:
        self._inner, self._label = inner, label

    def start(self, stage: str, total: int, done: int) -> None:
        """Begin a stage under its longer name."""
        self._inner.start(f"{self._label}, {stage}", total, done)

    def step(self, message: str) -> None:
        """Hand a step on."""
        self._inner.step(message)

    def finish(self) -> None:
        """Hand the end on."""
        self._inner.finish()
