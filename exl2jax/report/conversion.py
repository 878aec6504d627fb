"""The report of one conversion, from the files of its work directory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from exl2jax.conversion.shown import shown
from exl2jax.conversion.work_directory import WorkDirectory
from exl2jax.errors import JobError, MeasurementError
from exl2jax.measure.sensitivity import MEASURED
from exl2jax.qparams import QParams
from exl2jax.report.page import NumberTable, Page, Section
from exl2jax.report.plots import Plot, Theme, label, lines
from exl2jax.storage import read_json

type Curve = tuple[list[float], list[float]]
"""Widths in bits, and the error at each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """A finished conversion from its work directory: settings by module and linear, errors and curves by module."""

    title: str
    summary: Mapping[str, Any]
    qparams: Mapping[str, Mapping[str, QParams]]
    curves: Mapping[str, Curve]
    curve_unit: str


def read_conversion(path: Path, measurement: Path | None = None) -> Conversion:
    """Read a work directory, and a `measurement` made elsewhere. `JobError` when its conversion is not finished."""
    work = WorkDirectory(path)
    job = read_json(work.job_file, JobError, "the job file")
    records = job.get("records", {}) if isinstance(job, dict) else {}
    strategy = records.get("strategy")
    settings = job.get("settings") if isinstance(job, dict) else None
    if not isinstance(strategy, dict) or not isinstance(settings, dict) or "summary" not in records:
        raise JobError(f"{path}: the conversion is not finished; run it to its end, then ask for the report")
    qparams = {
        key: {name: QParams.from_json(q, f"{work.job_file}: {key}.{name}") for name, q in linears.items()}
        for key, linears in strategy["modules"].items()
    }
    source = measurement or work.measurement
    curves, unit = _curves(source, strategy["pricing"]) if source.exists() else ({}, "")
    return Conversion(
        title=Path(settings["in_dir"]).name,
        summary=records["summary"],
        qparams=qparams,
        curves=curves,
        curve_unit=unit,
    )


def conversion_page(conversion: Conversion) -> Page:
    """The page of one conversion."""
    s = conversion.summary
    facts = [
        ("preset", str(s["preset"])),
        ("bits per weight", f"{s['bpw']:.4f} (target {s['bits']:g})"),
        ("size", f"{s['size'] / 1e6:.1f} MB of {s['source_size'] / 1e6:.1f} MB"),
        ("calibration perplexity", f"{shown(s['perplexity'], 4)} (full precision {shown(s['perplexity_full'], 4)})"),
    ]
    table = NumberTable(identity="facts", caption="Result", header=("", ""), rows=facts)
    return Page(
        title=f"{conversion.title} at {s['bits']:g} bits",
        text="One conversion: the chosen bits, their cost, and the growth of the error through the depth.",
        warnings=tuple(s.get("warnings", ())),
        sections=(
            Section(title="Result", tables=(table,)),
            Section(title="Bits and errors", plots=conversion_plots(conversion)),
            Section(title="Time", plots=(time_plot({"": s.get("seconds") or {}}),)),
        ),
    )


def conversion_plots(conversion: Conversion, prefix: str = "", title: str = "") -> tuple[Plot, ...]:
    """Bits per block and projection, error against bits with the chosen points, error through the depth."""
    plots = [bits_plot(conversion, prefix, title)]
    if conversion.curves:
        plots.append(curves_plot(conversion, prefix, title))
    errors = conversion.summary.get("stream_error") or conversion.summary.get("rfn_error") or {}
    kind = "of the stream" if conversion.summary.get("stream_error") else "of each module alone (rfn_error)"
    if errors:
        plots.append(depth_plot({"error": errors}, f"{prefix}depth", f"Error {kind} through the depth{title}"))
    return tuple(plots)


def bits_plot(conversion: Conversion, prefix: str = "", title: str = "") -> Plot:
    """A map of the mean code width of every linear."""
    layers = sorted({_layer(key) for key in conversion.qparams})
    names = list(dict.fromkeys(name for linears in conversion.qparams.values() for name in linears))
    grid = np.full((len(names), len(layers)), np.nan)
    for key, linears in conversion.qparams.items():
        for name, qparams in linears.items():
            grid[names.index(name), layers.index(_layer(key))] = code_bits(qparams)

    def draw(axes: Axes, theme: Theme) -> None:
        shown = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=2, vmax=8)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="layer")
        bar = axes.figure.colorbar(shown, ax=axes, label="bits of a code, mean")
        bar.outline.set_edgecolor(theme.grid)  # type: ignore[operator]

    rows = [[name, *(f"{x:.2f}" for x in line)] for name, line in zip(names, grid, strict=True)]
    widest = names[int(np.nanargmax(np.nanmean(grid, axis=1)))]
    return Plot(
        name=f"{prefix}bits",
        title=f"Bits per block and projection{title}",
        alt=f"Map of {len(names)} projections by {len(layers)} layers: mean code width from {np.nanmin(grid):.2f} to "
        f"{np.nanmax(grid):.2f} bits; {widest} gets most.",
        draw=draw,
        header=("projection", *(f"layer {i}" for i in layers)),
        rows=rows,
    )


def curves_plot(conversion: Conversion, prefix: str = "", title: str = "") -> Plot:
    """A curve per block and the point that was chosen on it."""
    chosen = {key: _chosen(conversion, key) for key in conversion.curves}

    def draw(axes: Axes, theme: Theme) -> None:
        import matplotlib as mpl

        colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(conversion.curves)))
        for (key, (xs, ys)), colour in zip(conversion.curves.items(), colours, strict=True):
            axes.plot(xs, ys, linewidth=0.8, color=colour, alpha=0.7)
            axes.plot(*chosen[key], marker="o", markersize=3.5, color=colour, markeredgecolor=theme.ink)
        label(axes, "bits of a code, mean", conversion.curve_unit, log=True)

    rows = [
        [
            key,
            f"{x:.3f}",
            f"{y:.3e}",
            "; ".join(f"{b:.2f}: {e:.2e}" for b, e in zip(*conversion.curves[key], strict=True)),
        ]
        for key, (x, y) in chosen.items()
    ]
    return Plot(
        name=f"{prefix}curves",
        title=f"Error against bits of each block, chosen points marked{title}",
        alt=f"{len(conversion.curves)} falling curves, one per block, dark for the first and light for the last; "
        f"the chosen points lie between {min(x for x, _ in chosen.values()):.2f} and "
        f"{max(x for x, _ in chosen.values()):.2f} bits.",
        draw=draw,
        header=("block", "chosen bits", "error there", "curve"),
        rows=rows,
    )


def depth_plot(series: Mapping[str, Mapping[str, float]], name: str, title: str) -> Plot:
    """Errors by module, in the order of the modules, a line per series."""
    drawn = {label: ([i / 2 for i in range(len(errors))], list(errors.values())) for label, errors in series.items()}
    ends = ", ".join(f"{label} ends at {ys[-1]:.4f}" for label, (_, ys) in drawn.items() if ys)
    keys = list(dict.fromkeys(key for errors in series.values() for key in errors))
    return Plot(
        name=name,
        title=title,
        alt=f"Relative error after each of {len(keys)} modules: {ends}.",
        draw=lambda axes, theme: lines(axes, drawn, "layer", "relative error"),
        header=("module", *series),
        rows=[[key, *(f"{errors[key]:.5f}" if key in errors else "" for errors in series.values())] for key in keys],
    )


def time_plot(series: Mapping[str, Mapping[str, float]]) -> Plot:
    """Seconds by stage, a bar of stacked stages per series."""
    stages = list(dict.fromkeys(stage for seconds in series.values() for stage in seconds))
    totals = {name: sum(seconds.values()) for name, seconds in series.items()}
    longest = max(totals, key=lambda name: totals[name])
    return Plot(
        name="time",
        title="Time per stage",
        alt=f"Stacked bars of {', '.join(stages)}: {longest or 'the conversion'} takes {totals[longest]:.0f} seconds.",
        draw=partial(_draw_times, series=series, stages=stages),
        header=("", *stages, "all"),
        rows=[
            [name, *(f"{seconds.get(s, 0):.1f}" for s in stages), f"{totals[name]:.1f}"]
            for name, seconds in series.items()
        ],
        height=1.2 + 0.32 * len(series),
    )


def _draw_times(axes: Axes, theme: Theme, *, series: Mapping[str, Mapping[str, float]], stages: list[str]) -> None:
    names, left = list(series), np.zeros(len(series))
    for stage in stages:
        width = np.asarray([series[name].get(stage, 0.0) for name in names])
        axes.barh(range(len(names)), width, left=left, label=stage)
        left += width
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    label(axes, "seconds", "")
    axes.figure.legend(loc="outside upper center", ncols=4)  # type: ignore[call-arg]


def code_bits(qparams: QParams) -> float:
    """Mean width of a code under a setting, scales and tables apart."""
    return sum(bits * share for bits, share in zip(qparams.bits, qparams.bits_prop, strict=True))


def _layer(key: str) -> int:
    return next(int(part) for part in key.split(".") if part.isdigit())


def _mean_bits(linears: Mapping[str, QParams]) -> float:
    return sum(map(code_bits, linears.values())) / len(linears)


def _chosen(conversion: Conversion, key: str) -> tuple[float, float]:
    """The chosen width of a block, and its error by the curve between the measured points."""
    xs, ys = conversion.curves[key]
    bits = _mean_bits(conversion.qparams[key])
    return bits, float(np.exp(np.interp(bits, xs, np.log(np.maximum(ys, 1e-12)))))


def _curves(path: Path, pricing: str) -> tuple[dict[str, Curve], str]:
    """Curves of a measurement: stock's candidates, or the summed costs of a block's linears at single widths."""
    record = read_json(path, MeasurementError, "the measurement file")
    if pricing == "accuracy":
        rows = {key: row for key, row in record.get("measurement", {}).items() if row}
        return {key: _candidate_curve(key, row) for key, row in rows.items()}, "relative error of the block"
    costs: dict[str, dict[int, float]] = {}
    for key, linear in record.get("sensitivity", {}).get("linears", {}).items():
        for bits in (bits for bits, size in MEASURED if size == 128):
            module = costs.setdefault(key.rpartition(".")[0], {})
            module[bits] = module.get(bits, 0.0) + math.fsum(linear[f"{bits}:128"])
    curves = {key: ([float(b) for b in sorted(c)], [c[b] for b in sorted(c)]) for key, c in costs.items()}
    return curves, "expected KL, nats per token"


def _candidate_curve(key: str, candidates: list[dict[str, Any]]) -> Curve:
    """The lowest error up to each width: a falling curve."""
    points = []
    for candidate in candidates:
        settings = {n: QParams.from_json(q, f"{key}.{n}") for n, q in candidate.items() if isinstance(q, dict)}
        points.append((_mean_bits(settings), 1 - candidate["accuracy"]))
    points.sort()
    return [x for x, _ in points], np.minimum.accumulate([y for _, y in points]).tolist()
