"""Sweeps in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from exl2jax.conversion.shown import shown
from exl2jax.lab.estimate import Estimate


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The main figures of every cell."""
    table = Table(title="Sweep", box=box.SIMPLE)
    for name in ("variant", "bits", "seed", "bpw", "MB", "perplexity", "±", "KL", "top-1"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        identity = (row["variant"], f"{row['bits']:g}", str(row["seed"]))
        if row["status"] != "ok":
            table.add_row(*identity, f"failed: {row['error']}", style="red")
            continue
        size = f"{row['size'] / 1e6:.1f}"
        spread = "" if row["perplexity_se"] is None else f"{shown(row['perplexity_se'], 2)}"
        figures = (
            f"{shown(row['perplexity'], 3)}",
            spread,
            f"{row['kl_divergence']:.4f}",
            f"{row['top1_agreement']:.3f}",
        )
        table.add_row(*identity, f"{row['bpw']:.3f}", size, *figures)
    return table


def estimate_table(cells: Sequence[Estimate]) -> Table:
    """Size and time of every cell of a plan."""
    table = Table(title="Plan", box=box.SIMPLE)
    for name in ("cell", "MB", "minutes"):
        table.add_column(name, justify="left" if name == "cell" else "right")
    for cell in cells:
        table.add_row(cell.cell, f"{cell.size / 1e6:.1f}", "finished" if cell.finished else f"{cell.seconds / 60:.1f}")
    total = sum(cell.seconds for cell in cells) / 60
    table.add_row("all", f"{sum(cell.size for cell in cells) / 1e6:.1f}", f"{total:.1f}", style="bold")
    return table
