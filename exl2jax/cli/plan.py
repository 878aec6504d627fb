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
from exl2jax.conversion.preflight import Preflight, preflight
from exl2jax.errors import SettingsError
from exl2jax.estimate import DEVICES, DeviceEstimate, Passes, device_estimate, find_device
from exl2jax.estimate.devices import CPU
from exl2jax.hub import source_directory
from exl2jax.models.config import read_config
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
    device: Annotated[
        str | None,
        typer.Option("--device", help=f"Count memory and time on a device too: {KNOWN_DEVICES}."),
    ] = None,
    plugin: Plugins = None,
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
    estimate = None
    with tempfile.TemporaryDirectory() as nowhere:
        config = conversion_config(settings, Path(nowhere) / "work")
        target = None if config.output_measurement else config.compile_full or Path(nowhere) / "exl2"
        config = replace(config, in_dir=source_directory(config.in_dir), compile_full=target)
        if device is not None:
            estimate = _on_device(config, device)
            if not any(config.in_dir.glob("*.safetensors")):
                deliver(as_json, {"device": estimate.to_json()}, lambda: device_table(estimate))
                return 0 if estimate.fits else 1
        plan = called.spelled(_preflight(config), "warnings", "refused")
    if estimate is None:
        deliver(as_json, plan.to_json(), lambda: plan_table(plan))
    else:
        record = plan.to_json() | {"device": estimate.to_json()}
        deliver(as_json, record, lambda: Group(plan_table(plan), device_table(estimate)))
    return 1 if plan.refused else 0


def _preflight(config: ConversionConfig) -> Preflight:
    """The plan of a conversion, on the calibration rows of its passes."""
    opened = Context.open(config, RunControl())
    rows = PassRows(config, opened.model, opened.tokenizer, opened.work, opened.control)
    passes = ("quantize",) if config.measurement else ("measure", "quantize")
    return preflight(opened, {name: rows.build(measure=name == "measure") for name in passes})


def _on_device(config: ConversionConfig, device: str) -> DeviceEstimate:
    """The conversion counted on a device; rows and length not set are those of the built-in set."""
    known = find_device(device)
    model, _, _ = read_config(config.in_dir)
    wanted = {"rows": config.dataset_rows, "measurement_rows": config.measurement_rows, "length": config.length}
    given = {name: value for name, value in wanted.items() if value is not None}
    passes = Passes(**{"length": min(Passes().length, model.max_position)} | given)
    return device_estimate(model, config.recipe, passes, known)
