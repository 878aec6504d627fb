"""`exl2jax report`: a page of a conversion or a sweep."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from exl2jax.cli.options import Json
from exl2jax.cli.shared import deliver
from exl2jax.lab.page import sweep_page
from exl2jax.lab.sweep import TABLE_NAME
from exl2jax.report.conversion import conversion_page, read_conversion
from exl2jax.report.page import write_page
from exl2jax.report.plots import write_plots
from exl2jax.storage import make_directory


def report_command(
    directory: Annotated[Path, typer.Argument(help="Work directory of a conversion, or folder of a sweep.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write [the directory itself].")] = None,
    measurement: Annotated[
        Path | None, typer.Option("-m", "--measurement", help="The measurement, where it was made elsewhere.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Write report.html, one file that needs no other, and its plots as PNG and SVG."""
    target = out or directory
    sweep = (directory / TABLE_NAME).exists()
    page = sweep_page(directory) if sweep else conversion_page(read_conversion(directory, measurement))
    make_directory(target, "`out`")
    write_page(page, target / "report.html")
    write_plots(page.plots, target / "plots")
    record = {"report": str(target / "report.html"), "plots": [plot.name for plot in page.plots]}
    deliver(as_json, record, lambda: Text(f"{target / 'report.html'}: {len(page.plots)} plots"))
    return 0
