"""`exl2jax dequantize`: an EXL2 directory as a plain float16 one."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from exl2jax.cli.options import Json
from exl2jax.cli.shared import deliver
from exl2jax.exl2.dequantize import dequantize_model


def dequantize_command(
    directory: Annotated[Path, typer.Argument(help="EXL2 directory.")],
    out: Annotated[Path, typer.Argument(help="Directory to write, a Hugging Face model in float16.")],
    as_json: Json = False,
) -> int:
    """Write the dequantized model as a Hugging Face directory that transformers loads."""
    size = dequantize_model(directory, out)
    deliver(as_json, {"output": str(out), "size": size}, lambda: Text(f"{out}: {size / 1e6:.1f} MB of float16 weights"))
    return 0
