"""The page of a sweep: the table, quality against bits and size, errors through the depth, time."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from exl2jax.conversion.shown import shown
from exl2jax.errors import Exl2JaxError
from exl2jax.lab.cell import MEASUREMENT_NAME
from exl2jax.lab.results import STAGES, read_results
from exl2jax.lab.sweep import TABLE_NAME
from exl2jax.report.conversion import Conversion, conversion_plots, depth_plot, read_conversion, time_plot
from exl2jax.report.page import NumberTable, Page, Section
from exl2jax.report.plots import COLOURS, Plot, Theme, label
from exl2jax.storage.digests import digest

Row = Mapping[str, Any]
MEGABYTE = 1e6
SPREAD = "Lines join the means over seeds; bars reach from the least to the greatest."
SHARED = "Means over a variant's cells; a measurement is shared by all its targets."


def sweep_page(folder: Path) -> Page:
    """The page of the sweep in `folder`, of several models one after the other."""
    rows = read_results(folder / TABLE_NAME).to_pylist()
    done = [row for row in rows if row["status"] == "ok"]
    models = list(dict.fromkeys(row["model"] for row in done))
    sections = [Section(title="Cells", tables=(_cell_table(rows),))]
    for model in models:
        own = [row for row in done if row["model"] == model]
        name = Path(model).name if len(models) > 1 else ""
        sections += _model_sections(own, folder, f" ({name})" if name else "", f"{name}-" if name else "")
    failures = [f"{r['cell']} failed: {r['error']}" for r in rows if r["status"] != "ok"]
    cells_by_warning: dict[str, list[str]] = {}
    for row in done:
        for text in row["warnings"] or []:
            cells_by_warning.setdefault(text, []).append(row["cell"])
    warnings = [f"{text} ({len(cells)} of {len(rows)} cells)" for text, cells in cells_by_warning.items()]
    variants = len({row["variant"] for row in rows})
    targets, seeds = len({row["bits"] for row in rows}), len({row["seed"] for row in rows})
    return Page(
        title=f"Sweep: {', '.join(Path(m).name for m in models) or 'nothing finished'}",
        text=f"{len(rows)} cells: {targets} targets × {variants} variants × {seeds} seeds. Lower perplexity and KL "
        "divergence are better; KL divergence is of the full-precision model's predictions from the quantized one's.",
        warnings=(*failures, *warnings),
        sections=tuple(sections),
    )


def _model_sections(rows: Sequence[Row], folder: Path, title: str, prefix: str) -> list[Section]:
    middle = sorted({row["bits"] for row in rows})[len({row["bits"] for row in rows}) // 2]
    first = {}
    for row in rows:
        if row["bits"] == middle:
            first.setdefault(row["variant"], row)
    depth = {name: {d["module"]: d["error"] for d in row["depth_error"]} for name, row in first.items()}
    costs = {
        variant: {s: fmean(row[f"seconds_{s}"] for row in members) for s in STAGES}
        for variant, members in _by_variant(rows).items()
    }
    inside = [
        plot
        for name, row in first.items()
        if (conversion := _conversion(folder, row)) is not None
        for plot in conversion_plots(conversion, f"{prefix}{name}-", f": {name} at {middle:g} bits{title}")
    ]
    kl = "KL divergence, nats"
    quality = (
        _against_bits(rows, "perplexity", "perplexity", f"{prefix}perplexity", f"Perplexity against bits{title}"),
        _against_bits(rows, "kl_divergence", kl, f"{prefix}kl", f"KL divergence against bits{title}"),
        _frontier(rows, f"{prefix}frontier", f"Size against quality{title}"),
        depth_plot(depth, f"{prefix}depth", f"Error through the depth at {middle:g} bits{title}"),
    )
    return [
        Section(title=f"Quality{title}", text=SPREAD, plots=quality),
        Section(title=f"Time{title}", text=SHARED, plots=(time_plot(costs),)),
        Section(title=f"Inside{title}", plots=tuple(inside)),
    ]


def _conversion(folder: Path, row: Row) -> Conversion | None:
    """The conversion in the cell's own work directory, None where that is gone."""
    work = folder / "cells" / row["cell"] / "work"
    shared = sorted((folder / "measurements").glob(f"*/{MEASUREMENT_NAME}"))
    sha256 = row["sha256_measurement"]
    measurement = next((path for path in shared if digest(path) == sha256), None)
    try:
        return read_conversion(work, measurement)
    except Exl2JaxError:
        return None


def _by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(row["variant"], []).append(row)
    return members


def _cell_table(rows: Sequence[Row]) -> NumberTable:
    header = ("variant", "bits", "seed", "bpw", "MB", "perplexity", "±", "KL", "KL 99 %", "top-1", "minutes", "status")
    return NumberTable(identity="cells", caption="A row per cell", header=header, rows=[_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    identity = [row["variant"], f"{row['bits']:g}", str(row["seed"])]
    if row["status"] != "ok":
        return [*identity, *[""] * 8, "failed"]
    minutes = sum(row[f"seconds_{stage}"] or 0 for stage in STAGES) / 60
    return [
        *identity,
        f"{row['bpw']:.3f}",
        f"{row['size'] / MEGABYTE:.1f}",
        f"{shown(row['perplexity'], 3)}",
        f"{shown(row['perplexity_se'], 3)}" if row["perplexity_se"] is not None else "",
        f"{row['kl_divergence']:.4f}",
        f"{row['kl_p99']:.3f}",
        f"{row['top1_agreement']:.3f}",
        f"{minutes:.1f}",
        "ok",
    ]


def _against_bits(rows: Sequence[Row], column: str, unit: str, name: str, title: str) -> Plot:
    """Means over seeds by bits per weight, a line per variant, with their spread."""
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for variant, members in _by_variant(rows).items():
        by_bits: dict[float, list[Row]] = {}
        for row in members:
            by_bits.setdefault(row["bits"], []).append(row)
        for _, group in sorted(by_bits.items()):
            values = [row[column] for row in group]
            point = (fmean(row["bpw"] for row in group), fmean(values), min(values), max(values))
            series.setdefault(variant, []).append(point)
    full = fmean(row["perplexity_full"] for row in rows) if column == "perplexity" else None
    best = min(series, key=lambda variant: series[variant][0][1])
    return Plot(
        name=name,
        title=title,
        alt=f"{unit} against bits per weight for {', '.join(series)}; at the fewest bits {best} is lowest with "
        f"{series[best][0][1]:.4f}" + (f"; full precision has {full:.4f}." if full is not None else "."),
        draw=partial(_draw_spread, series=series, unit=unit, full=full),
        header=("variant", "bits per weight", "mean", "least", "greatest"),
        rows=[[v, f"{x:.4f}", *(f"{y:.5f}" for y in ys)] for v, points in series.items() for x, *ys in points],
    )


def _draw_spread(
    axes: Axes, theme: Theme, *, series: Mapping[str, Sequence[tuple[float, ...]]], unit: str, full: float | None
) -> None:
    for variant, points in series.items():
        x, mean, low, high = np.asarray(points).T
        axes.errorbar(x, mean, yerr=[mean - low, high - mean], marker="o", markersize=3.5, capsize=3, label=variant)
    if full is not None:
        axes.axhline(full, color=theme.ink, linewidth=0.8, linestyle="--", label="full precision")
    label(axes, "bits per weight", unit, log=True)
    axes.legend()


def _frontier(rows: Sequence[Row], name: str, title: str) -> Plot:
    """Every cell by size and KL divergence, and those for which no smaller cell is better."""
    ordered = sorted(rows, key=lambda row: (row["size"], row["kl_divergence"]))
    front, least = [], float("inf")
    for row in ordered:
        if row["kl_divergence"] < least:
            least = row["kl_divergence"]
            front.append(row)

    def draw(axes: Axes, theme: Theme) -> None:
        for colour, (variant, members) in zip(COLOURS * len(rows), _by_variant(rows).items(), strict=False):
            points = [(row["size"] / MEGABYTE, row["kl_divergence"]) for row in members]
            axes.scatter(*zip(*points, strict=True), s=14, color=colour, label=variant, zorder=3)
        axes.plot(
            [row["size"] / MEGABYTE for row in front],
            [row["kl_divergence"] for row in front],
            color=theme.ink,
            linewidth=0.8,
            label="frontier",
        )
        label(axes, "MB", "KL divergence, nats", log=True)
        axes.legend()

    members = ", ".join(dict.fromkeys(row["variant"] for row in front))
    return Plot(
        name=name,
        title=title,
        alt=f"{len(rows)} results by size and KL divergence; the frontier of {len(front)} is held by {members}.",
        draw=draw,
        header=("cell", "MB", "KL divergence", "on the frontier"),
        rows=[
            [
                row["cell"],
                f"{row['size'] / MEGABYTE:.2f}",
                f"{row['kl_divergence']:.5f}",
                "yes" if row in front else "no",
            ]
            for row in ordered
        ],
    )
