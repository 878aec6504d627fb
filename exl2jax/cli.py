"""The `exl2jax` command: arguments in, one call of the library, tables or JSON out, an exit code.

0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted with the work saved. Progress and messages go to stderr;
stdout carries the result only.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from typer.exceptions import TyperException

from exl2jax.calibration import CalibrationConfig, load_tokenizer, summarize
from exl2jax.errors import Exl2JaxError, Interrupted, JobError
from exl2jax.evaluate import evaluate, read_token_rows, text_rows
from exl2jax.evaluate.verify import verify
from exl2jax.models import open_model, read_config
from exl2jax.pipeline.calibrate import build_rows
from exl2jax.pipeline.config import ConversionConfig
from exl2jax.pipeline.convert import convert
from exl2jax.pipeline.job import WorkDirectory
from exl2jax.pipeline.progress import Control, StopFlag
from exl2jax.report import calibration_table, conversion_table, evaluation_table, make_progress, verify_table
from exl2jax.storage import make_directory, write_tensors
from exl2jax.version import VERSION

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Convert Hugging Face language models to mixed-precision EXL2 directories.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
CalColumns = Annotated[
    list[str] | None, typer.Option("--cal-column", help="Column of Parquet, field of JSON (repeatable).")
]
CalDir = Annotated[Path | None, typer.Option("--cal-dir", help="Folder with local copies of the named sets.")]
CalSplit = Annotated[str, typer.Option("--cal-split", help="Split of the named sets: train or validation.")]
CalFill = Annotated[
    bool, typer.Option("--cal-fill", help="Let the model write the rows that the standard text cannot fill.")
]
CACHE_MEGABYTES = 1024
INTERRUPTED = 128 + signal.SIGINT


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code; every error of ours becomes one line on stderr."""
    stop = StopFlag()
    caught: list[int] = []
    restore = _install_handlers(stop, caught)
    try:
        code = app(arguments, standalone_mode=False, obj=stop)
        if code == INTERRUPTED:  # Typer turns the second signal's KeyboardInterrupt into its exit code, without a word
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except Interrupted as e:
        _say(str(e))
        return 128 + caught[0] if caught else e.exit_code
    except Exl2JaxError as e:
        _say(f"error: {e}")
        return e.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted; run the same command to resume from the last checkpoint")
        return 128 + (caught[0] if caught else signal.SIGINT)
    except typer.Exit as e:
        return e.exit_code
    except TyperException as e:
        _say(f"usage error: {e.format_message().rstrip('.')}; see --help")
        return 2
    finally:
        restore()


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"exl2jax {VERSION}")
        raise typer.Exit


@app.command("convert")
def _convert(
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
        str | None, typer.Option("-c", "--cal_dataset", help="Calibration source: a file, or the built-in `standard`.")
    ] = None,
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
    allocation: Annotated[str, typer.Option("--allocation", help="Bit allocation: exact or annealing.")] = "exact",
    checkpoint_interval: Annotated[
        float, typer.Option("--checkpoint-interval", help="Least seconds between checkpoints; 0: every module.")
    ] = 180,
    as_json: Json = False,
) -> int:
    """Convert a model to EXL2; the flags are those of stock ExLlamaV2's convert.py."""
    del hidden_state_offload_layers
    console = Console(stderr=True)
    _set_up(console)
    config = ConversionConfig(
        in_dir=in_dir or _source_of_job(out_dir),
        out_dir=out_dir,
        no_resume=no_resume,
        compile_full=compile_full,
        cal_dataset=cal_dataset,
        bits=bits,
        shard_size=shard_size,
        rope_scale=rope_scale,
        rope_alpha=rope_alpha,
        head_bits=head_bits,
        output_measurement=output_measurement,
        measurement=measurement,
        dataset_rows=dataset_rows,
        measurement_rows=measurement_rows,
        length=length,
        measurement_length=measurement_length,
        seed=seed,
        allocation=allocation,
        checkpoint_interval=checkpoint_interval,
    )
    control = Control(progress=make_progress(console, status=status_output), stop=context.obj or StopFlag())
    result = convert(config, control)
    _deliver(as_json, result.to_json(), lambda: conversion_table(result))
    return 0


@app.command("verify")
def _verify(directory: Annotated[Path, typer.Argument(help="EXL2 directory.")], as_json: Json = False) -> int:
    """Check an EXL2 directory against the format; exit 1 with each fault named."""
    report = verify(directory)
    _deliver(as_json, {**asdict(report), "ok": report.ok}, lambda: verify_table(report))
    return 0 if report.ok else 1


@app.command("eval")
def _eval(
    directory: Annotated[Path, typer.Argument(help="Hugging Face or EXL2 directory.")],
    text: Annotated[Path | None, typer.Option("--text", help="Text file to predict.")] = None,
    tokens: Annotated[Path | None, typer.Option("--tokens", help="Token rows (input_ids) to predict.")] = None,
    against: Annotated[Path | None, typer.Option("--against", help="Directory to compare distributions with.")] = None,
    length: Annotated[int, typer.Option("-l", "--length", help="Tokens of a row of --text.")] = 512,
    rows: Annotated[int | None, typer.Option("-r", "--rows", help="Use only the first rows.")] = None,
    as_json: Json = False,
) -> int:
    """Perplexity of a directory; with --against, KL divergence and top-1 agreement too."""
    if (text is None) == (tokens is None):
        raise typer.BadParameter("give either --text FILE or --tokens FILE")
    _set_up(Console(stderr=True))
    ids = read_token_rows(tokens) if tokens else text_rows(text, directory, length)  # type: ignore[arg-type]
    found = evaluate(directory, ids[:rows], against)
    _deliver(as_json, asdict(found), lambda: evaluation_table([(str(directory), found)]))
    return 0


@app.command("calibrate")
def _calibrate(
    context: typer.Context,
    in_dir: Annotated[Path, typer.Option("-i", "--in_dir", help="Model directory.")],
    out: Annotated[Path, typer.Option("--out", help="File to write, FILE.safetensors.")],
    source: Annotated[str, typer.Option("-c", "--cal_dataset", help="Calibration source.")] = "standard",
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
    _set_up(console)
    control = Control(progress=make_progress(console, status=False), stop=context.obj or StopFlag())
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
    config, _, _ = read_config(in_dir)
    tokenizer = load_tokenizer(in_dir)
    built = build_rows(wanted, config, tokenizer, lambda: open_model(in_dir), control)
    make_directory(out.absolute().parent, "the directory of --out")
    write_tensors(out, built.tensors())
    summary = summarize(built, tokenizer, vocab_size=config.vocab_size)
    _deliver(as_json, summary.record(), lambda: calibration_table(summary))
    return 0


def _source_of_job(out_dir: Path) -> Path:
    """The source directory that the job in a work directory was begun with."""
    source = WorkDirectory(out_dir).source()
    if source is None:
        raise JobError(f"{out_dir}: holds no job to resume; name the source model with -i/--in_dir")
    return source


def _deliver(as_json: bool, record: dict[str, Any], table: Callable[[], Any]) -> None:
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False))
    else:
        Console().print(table())


def _set_up(console: Console) -> None:
    """Logging to stderr, and the persistent compilation cache unless the environment names one."""
    handler = logging.StreamHandler(console.file)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("exl2jax").setLevel(logging.INFO)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "exl2jax" / "xla"))
        jax.config.update("jax_compilation_cache_max_size", CACHE_MEGABYTES * 2**20)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _install_handlers(stop: StopFlag, caught: list[int]) -> Callable[[], None]:
    """First SIGINT or SIGTERM: stop at the next module boundary; second: at once. Returns how to undo it."""

    def handle(number: int, _: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        caught.append(number)
        stop.ask()
        _say("stopping after this module; a second signal stops at once")

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals stay with whoever has them
        before = {}

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    return restore


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(main())
