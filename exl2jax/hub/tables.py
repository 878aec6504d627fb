"""The table of a set of sizes for a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from exl2jax.conversion.sizes import SizeOutcome
from exl2jax.evaluation import Evaluation


def sizes_table(outcomes: Sequence[SizeOutcome], figures: Mapping[Path, Evaluation]) -> Table:
    """A row for each size: what it came to, its figures where they were measured, or why it was refused."""
    judged = ("perplexity", "KL", "top-1") if figures else ()
    table = Table("asked", "head", "bits per weight", "GB", *judged, "result", title="Sizes")
    for each in outcomes:
        if each.result is None or each.config is None:
            table.add_row(each.size.asked, str(each.size.head_bits), "", "", *([""] * len(judged)), each.refused)
            continue
        found = figures.get(each.config.compile_full or Path())
        cells = _cells(found) if found else [""] * len(judged)
        table.add_row(
            each.size.asked,
            str(each.size.head_bits),
            f"{each.result.bpw:.4f}",
            f"{(each.result.size or 0) / 1e9:.4g}",
            *cells,
            each.result.output,
        )
    return table


def _cells(found: Evaluation) -> list[str]:
    kl, agree = found.kl_divergence or 0.0, found.top1_agreement or 0.0
    return [f"{found.perplexity:.2f}", f"{kl:.4f}", f"{agree:.1%}"]
