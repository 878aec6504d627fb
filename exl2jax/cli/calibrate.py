"""`exl2jax calibrate`: build calibration rows and show them."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from exl2jax.calibration import load_tokenizer, summarize
from exl2jax.cli.options import Json, Plugins
from exl2jax.cli.settings import SettingsFile, conversion_config, takes_settings
from exl2jax.cli.shared import deliver, invocation, load_variants, set_up
from exl2jax.conversion.calibrate import build_rows
from exl2jax.models import open_model, read_config
from exl2jax.report import calibration_table, make_progress
from exl2jax.storage import make_directory, write_tensors
from exl2jax.stream.progress import RunControl


@takes_settings()
def calibrate_command(
    context: typer.Context,
    settings: dict[str, Any],
    out: Annotated[Path, typer.Option("--out", help="File to write, FILE.safetensors.")],
    measure: Annotated[bool, typer.Option("--measure", help="Rows of the measurement pass.")] = False,
    plugin: Plugins = None,
    settings_file: SettingsFile = None,
    as_json: Json = False,
) -> int:
    """Build the calibration rows of a conversion and show them, without converting."""
    del settings_file
    called = invocation(context)
    load_variants(plugin)
    console = Console(stderr=True)
    set_up(console, called.spelling)
    control = RunControl(progress=make_progress(console, status=False), stop=called.stop)
    with tempfile.TemporaryDirectory() as nowhere:
        config = conversion_config(settings, Path(nowhere))
    model, _, _ = read_config(config.in_dir)
    tokenizer = load_tokenizer(config.in_dir)
    rows = build_rows(
        config.calibration(measure=measure),
        model,
        tokenizer,
        lambda: open_model(config.in_dir, rope_scale=config.rope_scale, rope_alpha=config.rope_alpha),
        control,
        model_dir=config.in_dir,
    )
    make_directory(out.absolute().parent, "the directory of `out`")
    write_tensors(out, rows.tensors())
    summary = summarize(rows, tokenizer, vocab_size=model.vocab_size)
    deliver(as_json, summary.record(), lambda: calibration_table(summary))
    return 0
