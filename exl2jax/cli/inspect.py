"""`exl2jax inspect`: what the linears of an EXL2 directory are made of."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from exl2jax.cli.options import Json
from exl2jax.cli.shared import deliver
from exl2jax.exl2.inspect import inspect
from exl2jax.report import inspection_table


def inspect_command(
    directory: Annotated[Path, typer.Argument(help="EXL2 directory.")],
    tensor: Annotated[str | None, typer.Argument(help="Only linears whose name holds this.")] = None,
    against: Annotated[Path | None, typer.Option("--against", help="Original model to take errors against.")] = None,
    as_json: Json = False,
) -> int:
    """Widths, groups, scales and, with --against, the error of every linear."""
    linears = inspect(directory, tensor, against)
    deliver(as_json, {"linears": [asdict(x) for x in linears]}, lambda: inspection_table(linears))
    return 0
