"""`exl2jax convert`: the stock converter's flags, and ours."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from exl2jax.calibration import CalibrationConfig
from exl2jax.calibration.records import STANDARD
from exl2jax.calibration.source import KNOWN
from exl2jax.cli.options import (
    CalColumns,
    CalDir,
    CalFill,
    CalSplit,
    Candidates,
    ExcludeBits,
    Json,
    Pins,
    Plugins,
    Variants,
)
from exl2jax.cli.shared import deliver, load_variants, recipe_asked, set_up, settings_file
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.convert import convert
from exl2jax.conversion.settings import resumed_config
from exl2jax.conversion.work_directory import WorkDirectory
from exl2jax.report import conversion_table, make_progress
from exl2jax.stream.devices import join_processes
from exl2jax.stream.progress import RunControl, StopFlag
from exl2jax.variants.recipe import DEFAULT_PRESET

CALIBRATION = {"cal_column", "cal_dir", "cal_split", "cal_fill"}
"""Parameters that say more about the calibration source."""


def convert_command(
    context: typer.Context,
    out_dir: Annotated[Path, typer.Option("-o", "--out_dir", help="Work directory; an existing job in it is resumed.")],
    in_dir: Annotated[
        Path | None, typer.Option("-i", "--in_dir", help="Source model directory; may be left out to resume.")
    ] = None,
    no_resume: Annotated[bool, typer.Option("-nr", "--no_resume", help="Start over, clearing the job.")] = False,
    compile_full: Annotated[
        Path | None, typer.Option("-cf", "--compile_full", help="Directory for the complete EXL2 model.")
    ] = None,
    cal_dataset: Annotated[
        str | None, typer.Option("-c", "--cal_dataset", help=f"Calibration source: {KNOWN}; mixed as A:60,B:40.")
    ] = None,
    cal_column: CalColumns = None,
    cal_dir: CalDir = None,
    cal_split: CalSplit = "train",
    cal_fill: CalFill = False,
    bits: Annotated[float, typer.Option("-b", "--bits", help="Target bits per weight.")] = 4.125,
    shard_size: Annotated[
        float, typer.Option("-ss", "--shard_size", help="Largest shard in MB; 0 for one file.")
    ] = 8192,
    rope_scale: Annotated[float | None, typer.Option("-rs", "--rope_scale", help="Rotary position scale.")] = None,
    rope_alpha: Annotated[float | None, typer.Option("-ra", "--rope_alpha", help="Rotary NTK alpha.")] = None,
    head_bits: Annotated[int, typer.Option("-hb", "--head_bits", help="Bits of the head: 2, 3, 4, 5, 6 or 8.")] = 6,
    output_measurement: Annotated[
        Path | None, typer.Option("-om", "--output_measurement", help="Only measure, and write the file here.")
    ] = None,
    measurement: Annotated[
        Path | None, typer.Option("-m", "--measurement", help="Use this measurement file, ours or stock's.")
    ] = None,
    dataset_rows: Annotated[
        int | None, typer.Option("-r", "--dataset_rows", help="Calibration rows [115 built-in, else 100].")
    ] = None,
    measurement_rows: Annotated[
        int | None, typer.Option("-mr", "--measurement_rows", help="Measurement rows [19 built-in, else 16].")
    ] = None,
    length: Annotated[int | None, typer.Option("-l", "--length", help="Tokens of a calibration row [2048].")] = None,
    measurement_length: Annotated[
        int | None, typer.Option("-ml", "--measurement_length", help="Tokens of a measurement row [2048].")
    ] = None,
    status_output: Annotated[
        bool, typer.Option("-so", "--status_output", help="Add machine-readable status lines.")
    ] = False,
    hidden_state_offload_layers: Annotated[
        int,
        typer.Option(
            "-hsol", "--hidden_state_offload_layers", help="Accepted for stock scripts; states stay in host memory."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random choice.")] = 0,
    preset: Annotated[
        str, typer.Option("--preset", help="best, fast, or stock, which reproduces ExLlamaV2's own algorithm.")
    ] = DEFAULT_PRESET,
    with_accuracies: Annotated[
        bool, typer.Option("--with-accuracies", help="Measure stock's accuracies too, for stock's tools to read.")
    ] = False,
    allocation: Annotated[str, typer.Option("--allocation", help="Solver of stock: exact or annealing.")] = "exact",
    candidates: Candidates = None,
    moe_calibration: Annotated[
        str, typer.Option("--moe-calibration", help="Tokens to calibrate experts on: routed, or all.")
    ] = "routed",
    checkpoint_interval: Annotated[
        float, typer.Option("--checkpoint-interval", help="Least seconds between checkpoints; 0: every module.")
    ] = 180,
    devices: Annotated[
        int | None, typer.Option("--devices", help="Devices to spread rows and linears over [all].")
    ] = None,
    device_memory: Annotated[
        float | None,
        typer.Option("--device-memory", help="GB of a device for hidden states [half of what is free]."),
    ] = None,
    variant: Variants = None,
    plugin: Plugins = None,
    pin: Pins = None,
    exclude_bits: ExcludeBits = None,
    settings: Annotated[
        Path | None,
        typer.Option("--settings", callback=settings_file, is_eager=True, help="TOML file with flags by name."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Convert a model to EXL2; the flags are those of stock ExLlamaV2's convert.py."""
    del hidden_state_offload_layers, settings
    load_variants(plugin)
    console = Console(stderr=True)
    set_up(console)
    join_processes()
    asked = {
        "in_dir": in_dir,
        "no_resume": no_resume,
        "compile_full": compile_full,
        "cal_dataset": _source(cal_dataset, cal_column, cal_dir, cal_split, cal_fill),
        "bits": bits,
        "shard_size": shard_size,
        "rope_scale": rope_scale,
        "rope_alpha": rope_alpha,
        "head_bits": head_bits,
        "output_measurement": output_measurement,
        "measurement": measurement,
        "dataset_rows": dataset_rows,
        "measurement_rows": measurement_rows,
        "length": length,
        "measurement_length": measurement_length,
        "seed": seed,
        "preset": recipe_asked(preset, variant, candidates),
        "with_accuracies": with_accuracies,
        "pins": tuple(pin or ()),
        "exclude_bits": tuple(exclude_bits or ()),
        "allocation": allocation,
        "checkpoint_interval": checkpoint_interval,
        "moe_calibration": moe_calibration,
        "devices": devices,
        "device_memory": device_memory,
    }
    config = ConversionConfig(out_dir=out_dir, **asked) if in_dir else _resumed(context, out_dir, asked)
    control = RunControl(progress=make_progress(console, status=status_output), stop=context.obj or StopFlag())
    result = convert(config, control)
    deliver(as_json, result.to_json(), lambda: conversion_table(result))
    return 0


def _source(
    name: str | None, columns: list[str] | None, cal_dir: Path | None, split: str, fill: bool
) -> str | CalibrationConfig | None:
    """The calibration source: its name alone, where nothing more is said about it."""
    if not (columns or cal_dir or fill or split != "train"):
        return name
    return CalibrationConfig(
        source=name or STANDARD, columns=tuple(columns or ()), cal_dir=cal_dir, split=split, fill_with_self=fill
    )


def _resumed(context: typer.Context, out_dir: Path, asked: dict[str, Any]) -> ConversionConfig:
    """The settings of the job in a work directory, and over them the flags that were given now."""
    record = WorkDirectory(out_dir).settings()
    flags = {n for n in context.params if (s := context.get_parameter_source(n)) and s.name != "DEFAULT"}
    renamed = {"pin": "pins", "variant": "preset", "candidates": "preset"}
    flags |= {renamed[n] for n in flags & set(renamed)}
    given = {n: v for n, v in asked.items() if n in flags or (n == "cal_dataset" and flags & CALIBRATION)}
    return resumed_config(out_dir, record, given)
