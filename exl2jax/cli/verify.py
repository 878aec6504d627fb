"""`exl2jax verify`: check an EXL2 directory."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from exl2jax.cli.options import Json
from exl2jax.cli.shared import deliver
from exl2jax.exl2.verify.directory import verify
from exl2jax.report import verify_table


def verify_command(directory: Annotated[Path, typer.Argument(help="EXL2 directory.")], as_json: Json = False) -> int:
    """Check an EXL2 directory against the format; exit 1 with each fault named."""
    report = verify(directory)
    deliver(as_json, {**asdict(report), "ok": report.ok}, lambda: verify_table(report))
    return 0 if report.ok else 1
