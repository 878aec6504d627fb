"""`exl2jax calibrate`: build calibration rows and show them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from exl2jax.calibration import CalibrationConfig, load_tokenizer, summarize
from exl2jax.calibration.records import STANDARD
from exl2jax.calibration.source import KNOWN
from exl2jax.cli.options import CalColumns, CalDir, CalFill, CalSplit, Json
from exl2jax.cli.shared import deliver, set_up
from exl2jax.conversion.calibrate import build_rows
from exl2jax.hub import source_directory
from exl2jax.models import open_model, read_config
from exl2jax.report import calibration_table, make_progress
from exl2jax.storage import make_directory, write_tensors
from exl2jax.stream.progress import RunControl, StopFlag


def calibrate_command(
    context: typer.Context,
    in_dir: Annotated[Path, typer.Option("-i", "--in_dir", help="Model: a directory, or ORG/NAME[@REVISION].")],
    out: Annotated[Path, typer.Option("--out", help="File to write, FILE.safetensors.")],
    source: Annotated[str, typer.Option("-c", "--cal_dataset", help=f"Source: {KNOWN}.")] = STANDARD,
    rows: Annotated[int | None, typer.Option("-r", "--rows", help="Rows.")] = None,
    length: Annotated[int | None, typer.Option("-l", "--length", help="Tokens of a row.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Rows of the measurement pass.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random choice.")] = 0,
    cal_column: CalColumns = None,
    cal_dir: CalDir = None,
    cal_split: CalSplit = "train",
    cal_fill: CalFill = False,
    as_json: Json = False,
) -> int:
    """Build calibration rows and show them, without converting."""
    console = Console(stderr=True)
    set_up(console)
    control = RunControl(progress=make_progress(console, status=False), stop=context.obj or StopFlag())
    wanted = CalibrationConfig(
        source=source,
        rows=rows,
        length=length,
        seed=seed,
        measure=measure,
        columns=tuple(cal_column or ()),
        cal_dir=cal_dir,
        split=cal_split,
        fill_with_self=cal_fill,
    )
    in_dir = source_directory(in_dir)
    config, _, _ = read_config(in_dir)
    tokenizer = load_tokenizer(in_dir)
    built = build_rows(wanted, config, tokenizer, lambda: open_model(in_dir), control)
    make_directory(out.absolute().parent, "the directory of --out")
    write_tensors(out, built.tensors())
    summary = summarize(built, tokenizer, vocab_size=config.vocab_size)
    deliver(as_json, summary.record(), lambda: calibration_table(summary))
    return 0
