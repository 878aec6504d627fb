"""Plots with a title, alternative text, and their numbers as a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from exl2jax.storage import make_directory, write_bytes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#999933")
"""Colours that colour-blind readers tell apart, readable on white and on black (Okabe and Ito)."""

SIZE = (4.8, 3.2)
"""Inches; text is nine pixels high at the width of a phone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """Colours of paper and ink."""

    name: str
    ink: str
    paper: str
    grid: str


LIGHT = Theme(name="light", ink="#1b1f24", paper="#ffffff", grid="#d9dde2")
DARK = Theme(name="dark", ink="#e6e9ed", paper="#15181c", grid="#3a4048")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A picture: `draw` puts it on empty axes; `alt` says what it shows, `header` and `rows` hold its numbers."""

    name: str
    title: str
    alt: str
    draw: Callable[[Axes, Theme], Any]
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    height: float = SIZE[1]


def render(plot: Plot, theme: Theme, kind: str) -> bytes:
    """The picture as `svg` or `png`, the same bytes for the same numbers."""
    style: Any = {
        "font.size": 9,
        "svg.hashsalt": "exl2jax",
        "svg.fonttype": "none",
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.paper,
        "axes.prop_cycle": cycler(color=list(COLOURS)),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(SIZE[0], plot.height), layout="constrained", facecolor=theme.paper)
        plot.draw(figure.subplots(), theme)
        buffer = BytesIO()
        figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def write_plots(plots: Sequence[Plot], folder: Path) -> None:
    """Every plot as `NAME.svg` and `NAME.png` on white, for papers and slides."""
    make_directory(folder, "the folder of plots")
    for plot in plots:
        for kind in ("svg", "png"):
            data = render(plot, LIGHT, kind)
            write_bytes(folder / f"{plot.name}.{kind}", data)


def lines(
    axes: Axes, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, *, log: bool = False
) -> None:
    """A line per name over shared axes."""
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, marker="o", markersize=3, linewidth=1.3, label=name)
    label(axes, x, y, log=log)
    if 1 < len(series) <= len(COLOURS):
        axes.legend()


def label(axes: Axes, x: str, y: str, *, log: bool = False) -> None:
    """Name the axes, draw a grid, and take a logarithmic height with `log`."""
    axes.set(xlabel=x, ylabel=y)
    if log:
        axes.set_yscale("log")
    axes.grid(visible=True)
    axes.set_axisbelow(True)
