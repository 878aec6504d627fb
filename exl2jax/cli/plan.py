"""`exl2jax plan`: what a conversion takes and gives, before anything is computed."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group

from exl2jax.cli.options import Json, Plugins
from exl2jax.cli.settings import SettingsFile, conversion_config, takes_settings
from exl2jax.cli.shared import deliver, invocation, load_variants, set_up
from exl2jax.conversion.calibrate import PassRows
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.context import Context
from exl2jax.conversion.operations import machine_speed, passes_of
from exl2jax.conversion.preflight import Preflight, preflight
from exl2jax.conversion.tune_pass import text_to_tune
from exl2jax.errors import SettingsError
from exl2jax.estimate import DEVICES, Device, DeviceEstimate, device_estimate, find_device
from exl2jax.estimate.devices import CPU
from exl2jax.models import read_config
from exl2jax.report import device_table, plan_table
from exl2jax.stream.progress import RunControl

KNOWN_DEVICES = ", ".join((*DEVICES, CPU))


@takes_settings()
def plan_command(
    context: typer.Context,
    settings: dict[str, Any],
    model: Annotated[
        Path | None,
        typer.Argument(help="Source model, as -i names it."),
    ] = None,
    plugin: Plugins = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help=f"Count memory and time on a device too: {KNOWN_DEVICES}."),
    ] = None,
    settings_file: SettingsFile = None,
    as_json: Json = False,
) -> int:
    """Range of bits, size, disk, memory and calibration of a conversion; exit 1 when it would be refused."""
    del settings_file
    if model is not None:
        if "in_dir" in settings:
            raise SettingsError("the source model is named twice, by `in_dir` and alone; give one")
        settings = {**settings, "in_dir": model}
    called = invocation(context)
    load_variants(plugin)
    set_up(Console(stderr=True), called.spelling)
    with tempfile.TemporaryDirectory() as nowhere:
        config = _with_places(conversion_config(settings, Path(nowhere) / "work"), Path(nowhere) / "exl2")
        counted = None if device is None else _on_device(config, find_device(device))
        if counted is not None and not any(config.in_dir.glob("*.safetensors")):
            deliver(as_json, {"device": counted.to_json()}, lambda: device_table(counted))
            return 0 if counted.fits else 1
        plan = called.spelled(_plan(config), "warnings", "refused")
    if counted is None:
        deliver(as_json, plan.to_json(), lambda: plan_table(plan))
    else:
        record = plan.to_json() | {"device": counted.to_json()}
        deliver(as_json, record, lambda: Group(plan_table(plan), device_table(counted)))
    return 1 if plan.refused else 0


def _with_places(config: ConversionConfig, target: Path) -> ConversionConfig:
    """The conversion with `target` for its result where none is named."""
    named = config.output_measurement or config.compile_full
    return config if named else replace(config, compile_full=target)


def _plan(config: ConversionConfig) -> Preflight:
    opened = Context.open(config, RunControl())
    rows = PassRows(config, opened.model, opened.tokenizer, opened.work, opened.control, sampling=False)
    passes = ("quantize",) if config.measurement else ("measure", "quantize")
    built = {name: rows.build(measure=name == "measure") for name in passes}
    tunes = opened.recipe.tuned_steps and config.output_measurement is None
    return preflight(opened, built, machine_speed(), text_to_tune(opened, rows) if tunes else None)


def _on_device(config: ConversionConfig, device: Device) -> DeviceEstimate:
    """The conversion counted on a device, from the model's configuration alone."""
    model, _, _ = read_config(config.in_dir)
    return device_estimate(model, config.recipe, passes_of(config, model), device)
