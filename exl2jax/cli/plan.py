"""`exl2jax plan`: what a conversion will take and give, before anything is computed."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group

from exl2jax.cli.options import Candidates, ExcludeBits, Json, Pins, Plugins, Variants
from exl2jax.cli.shared import deliver, load_variants, recipe_asked, set_up
from exl2jax.conversion.calibrate import PassRows
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.context import Context
from exl2jax.conversion.preflight import preflight
from exl2jax.estimate import DEVICES, DeviceEstimate, Passes, device_estimate, find_device
from exl2jax.estimate.devices import CPU
from exl2jax.hub import source_directory
from exl2jax.models.config import read_config
from exl2jax.report import device_table, plan_table
from exl2jax.stream.progress import RunControl
from exl2jax.variants.recipe import DEFAULT_PRESET, Recipe, find_recipe

KNOWN_DEVICES = ", ".join((*DEVICES, CPU))


def plan_command(
    in_dir: Annotated[Path, typer.Argument(help="Source model: a directory, or ORG/NAME[@REVISION] of the Hub.")],
    bits: Annotated[float, typer.Option("-b", "--bits", help="Target bits per weight.")] = 4.125,
    head_bits: Annotated[int, typer.Option("-hb", "--head_bits", help="Bits of the head.")] = 6,
    out_dir: Annotated[Path | None, typer.Option("-o", "--out_dir", help="Where the work directory would be.")] = None,
    compile_full: Annotated[
        Path | None, typer.Option("-cf", "--compile_full", help="Where the complete EXL2 model would be.")
    ] = None,
    cal_dataset: Annotated[str | None, typer.Option("-c", "--cal_dataset", help="Calibration source.")] = None,
    dataset_rows: Annotated[int | None, typer.Option("-r", "--dataset_rows", help="Calibration rows.")] = None,
    measurement_rows: Annotated[int | None, typer.Option("-mr", "--measurement_rows", help="Measurement rows.")] = None,
    length: Annotated[int | None, typer.Option("-l", "--length", help="Tokens of a row.")] = None,
    measurement: Annotated[
        Path | None, typer.Option("-m", "--measurement", help="Allocate by this measurement: the size is then exact.")
    ] = None,
    shard_size: Annotated[
        float, typer.Option("-ss", "--shard_size", help="Largest shard in MB; 0 for one file.")
    ] = 8192,
    preset: Annotated[str, typer.Option("--preset", help="best, fast or stock.")] = DEFAULT_PRESET,
    candidates: Candidates = None,
    variant: Variants = None,
    plugin: Plugins = None,
    pin: Pins = None,
    exclude_bits: ExcludeBits = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help=f"Count memory and time on a device too: {KNOWN_DEVICES}."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Range of bits, size, disk, memory and calibration of a conversion; exit 1 when it would be refused."""
    load_variants(plugin)
    set_up(Console(stderr=True))
    recipe, in_dir, estimate = recipe_asked(preset, variant, candidates), source_directory(in_dir), None
    if device is not None:
        asked = {"rows": dataset_rows, "measurement_rows": measurement_rows, "length": length}
        estimate = _on_device(in_dir, find_recipe(recipe) if isinstance(recipe, str) else recipe, device, asked)
        if not any(in_dir.glob("*.safetensors")):
            deliver(as_json, {"device": estimate.to_json()}, lambda: device_table(estimate))
            return 0 if estimate.fits else 1
    with tempfile.TemporaryDirectory() as nowhere:
        config = ConversionConfig(
            in_dir=in_dir,
            out_dir=out_dir or Path(nowhere) / "work",
            compile_full=compile_full or Path(nowhere) / "exl2",
            cal_dataset=cal_dataset,
            bits=bits,
            head_bits=head_bits,
            dataset_rows=dataset_rows,
            measurement_rows=measurement_rows,
            length=length,
            measurement_length=length,
            measurement=measurement,
            shard_size=shard_size,
            preset=recipe,
            pins=tuple(pin or ()),
            exclude_bits=tuple(exclude_bits or ()),
        )
        context = Context.open(config, RunControl())
        built = PassRows(config, context.model, context.tokenizer, context.work, context.control)
        passes = ("quantize",) if measurement else ("measure", "quantize")
        plan = preflight(context, {name: built.build(measure=name == "measure") for name in passes})
    if estimate is None:
        deliver(as_json, plan.to_json(), lambda: plan_table(plan))
    else:
        record = plan.to_json() | {"device": estimate.to_json()}
        deliver(as_json, record, lambda: Group(plan_table(plan), device_table(estimate)))
    return 1 if plan.refused else 0


def _on_device(in_dir: Path, recipe: Recipe, device: str, asked: Mapping[str, int | None]) -> DeviceEstimate:
    """The conversion counted on a device, with the rows that are asked for, else those of the built-in set."""
    known = find_device(device)
    config, _, _ = read_config(in_dir)
    given = {name: value for name, value in asked.items() if value is not None}
    passes = Passes(**{"length": min(Passes().length, config.max_position)} | given)
    return device_estimate(config, recipe, passes, known)
