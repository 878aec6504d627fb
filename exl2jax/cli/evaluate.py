"""`exl2jax eval`: how well directories predict text."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from exl2jax.cli.options import Json
from exl2jax.cli.shared import deliver, set_up
from exl2jax.evaluation import evaluate_many, load_eval_rows
from exl2jax.evaluation.harness import run_tasks
from exl2jax.evaluation.rows import HELDOUT
from exl2jax.hub import source_directory
from exl2jax.report import evaluation_table, harness_table

HELDOUT_LENGTH, FILE_LENGTH = 256, 512
"""Tokens of a row: the built-in text is short, and every domain should have several rows."""


def eval_command(
    directories: Annotated[
        list[Path], typer.Argument(help="Hugging Face or EXL2 directories, or ORG/NAME[@REVISION].")
    ],
    text: Annotated[Path | None, typer.Option("--text", help="Text or Parquet file to predict.")] = None,
    tokens: Annotated[Path | None, typer.Option("--tokens", help="Token rows (input_ids) to predict.")] = None,
    against: Annotated[Path | None, typer.Option("--against", help="Directory to compare distributions with.")] = None,
    length: Annotated[
        int | None, typer.Option("-l", "--length", help="Tokens of a row of text [256 built-in, else 512].")
    ] = None,
    rows: Annotated[int | None, typer.Option("-r", "--rows", help="Use only so many rows.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Task of lm-evaluation-harness to run instead (repeatable).")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Examples of each --task.")] = None,
    as_json: Json = False,
) -> int:
    """Perplexity of directories on the built-in held-out text or yours; with --against, KL divergence and agreement."""
    if text is not None and tokens is not None:
        raise typer.BadParameter("give --text FILE or --tokens FILE, not both")
    if length is not None and length < 2:
        raise typer.BadParameter("--length must be at least 2")
    set_up(Console(stderr=True))
    directories = [source_directory(path) for path in directories]
    against = against and source_directory(against)
    if tasks:
        figures = {str(path): run_tasks(path, tasks, limit) for path in directories}
        deliver(as_json, figures, lambda: harness_table(figures))
        return 0
    source = tokens or text or HELDOUT
    cut = length or (FILE_LENGTH if text else HELDOUT_LENGTH)
    evaluations = dict(evaluate_many(directories, load_eval_rows(source, directories[0], cut, rows), against))
    records = [{"directory": str(path), **asdict(e)} for path, e in evaluations.items()]
    single = len(records) == 1
    record = records[0] if single else {"evaluations": records}
    deliver(as_json, record, lambda: evaluation_table([(str(path), e) for path, e in evaluations.items()]))
    return 0
