"""`exl2jax convert`: the stock converter's flags, and ours."""

from typing import Annotated, Any

import typer
from rich.console import Console

from exl2jax.cli.options import Json, Plugins
from exl2jax.cli.settings import SettingsFile, conversion_config, takes_settings
from exl2jax.cli.shared import deliver, invocation, load_variants, set_up
from exl2jax.conversion.convert import convert
from exl2jax.report import conversion_table, make_progress
from exl2jax.stream.devices import join_processes
from exl2jax.stream.progress import RunControl


@takes_settings(required=("out_dir",))
def convert_command(
    context: typer.Context,
    settings: dict[str, Any],
    status_output: Annotated[
        bool, typer.Option("-so", "--status_output", help="Add machine-readable status lines.")
    ] = False,
    hidden_state_offload_layers: Annotated[
        int,
        typer.Option(
            "-hsol", "--hidden_state_offload_layers", help="Accepted for stock scripts; states stay in host memory."
        ),
    ] = 0,
    plugin: Plugins = None,
    settings_file: SettingsFile = None,
    as_json: Json = False,
) -> int:
    """Convert a model to EXL2; the flags are those of stock ExLlamaV2's convert.py."""
    del hidden_state_offload_layers, settings_file
    called = invocation(context)
    load_variants(plugin)
    console = Console(stderr=True)
    set_up(console, called.spelling)
    join_processes()
    config = conversion_config(settings)
    control = RunControl(progress=make_progress(console, status=status_output), stop=called.stop)
    result = called.spelled(convert(config, control), "warnings")
    deliver(as_json, result.to_json(), lambda: conversion_table(result))
    return 0
