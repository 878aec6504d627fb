"""`exl2jax plan`: what a conversion takes and gives, before anything is computed."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from exl2jax.cli.options import Json, Plugins
from exl2jax.cli.settings import SettingsFile, conversion_config, takes_settings
from exl2jax.cli.shared import deliver, invocation, load_variants, set_up
from exl2jax.conversion.calibrate import PassRows
from exl2jax.conversion.context import Context
from exl2jax.conversion.operations import machine_speed
from exl2jax.conversion.preflight import preflight
from exl2jax.errors import SettingsError
from exl2jax.report import plan_table
from exl2jax.stream.progress import RunControl


@takes_settings()
def plan_command(
    context: typer.Context,
    settings: dict[str, Any],
    model: Annotated[
        Path | None,
        typer.Argument(help="Source model, as -i names it."),
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
    with tempfile.TemporaryDirectory() as nowhere:
        config = conversion_config(settings, Path(nowhere) / "work")
        target = None if config.output_measurement else config.compile_full or Path(nowhere) / "exl2"
        config = replace(config, compile_full=target)
        opened = Context.open(config, RunControl())
        rows = PassRows(config, opened.model, opened.tokenizer, opened.work, opened.control, sampling=False)
        passes = ("quantize",) if config.measurement else ("measure", "quantize")
        plan = preflight(opened, {name: rows.build(measure=name == "measure") for name in passes}, machine_speed())
    plan = called.spelled(plan, "warnings", "refused")
    deliver(as_json, plan.to_json(), lambda: plan_table(plan))
    return 1 if plan.refused else 0
