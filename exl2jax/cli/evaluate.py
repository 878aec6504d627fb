"""`exl2jax eval`: how well a directory predicts text."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from exl2jax.cli.options import Json
from exl2jax.cli.shared import deliver, set_up
from exl2jax.evaluate import evaluate, read_token_rows, text_rows
from exl2jax.report import evaluation_table


def eval_command(
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
    set_up(Console(stderr=True))
    ids = read_token_rows(tokens) if tokens else text_rows(text, directory, length)  # type: ignore[arg-type]
    found = evaluate(directory, ids[:rows], against)
    deliver(as_json, asdict(found), lambda: evaluation_table([(str(directory), found)]))
    return 0
