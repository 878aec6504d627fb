"""Summaries as tables."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from exl2jax.calibration import CalibrationSummary
from exl2jax.conversion.preflight import Preflight
from exl2jax.conversion.result import ConversionResult
from exl2jax.conversion.shown import shown
from exl2jax.estimate import DeviceEstimate
from exl2jax.evaluation import Evaluation, Figures
from exl2jax.exl2.inspect import LinearInspection
from exl2jax.exl2.verify.directory import VerifyReport

MEGABYTE, GIGABYTE = 1e6, 1e9

NOT_JUDGED = "not judged: the weights were fitted to the calibration rows; `exl2jax eval` judges them on other text"
"""The line of the summary for a result without figures on held-out text."""


def conversion_table(result: ConversionResult, found: Evaluation | None = None) -> Table:
    """The summary of a conversion, with the figures on held-out text where it was judged."""
    table = _two_columns("Conversion")
    table.add_row("result", result.output)
    table.add_row("preset", result.preset)
    if result.bpw is not None:
        table.add_row("bits per weight", f"{result.bpw:.4f} (asked {result.bits:g}), head {result.head_bits}")
    if result.size is not None and result.source_size is not None:
        ratio = result.source_size / result.size
        table.add_row("size", f"{result.size / MEGABYTE:.1f} MB ({ratio:.2f} times smaller than the source)")
    if result.perplexity is not None and result.perplexity_full is not None:
        table.add_row(
            "calibration perplexity",
            f"{shown(result.perplexity, 3)} (full precision {shown(result.perplexity_full, 3)})",
        )
        table.add_row("quality on other text", NOT_JUDGED if found is None else _judged(found))
    if result.tuned and "steps" in result.tuned:
        table.add_row("tuned as a whole", _tuned(result.tuned))
    for name, errors in (("mean rfn_error", result.rfn_error), ("mean stream error", result.stream_error)):
        if errors:
            table.add_row(name, f"{fmean(errors.values()):.5f}")
    for stage, seconds in (result.seconds or {}).items():
        table.add_row(f"seconds, {stage}", f"{seconds:.1f}")
    _add_warnings(table, result.warnings)
    return table


def _tuned(record: Mapping[str, Any]) -> str:
    before, after = shown(record["before"], 4), shown(record["after"], 4)
    return f"KL divergence {before} to {after} on text kept apart, {record['steps']} steps on {record['tokens']} tokens"


def _judged(found: Evaluation) -> str:
    figures = f"KL divergence {shown(found.kl_divergence or 0.0, 4)}, top-1 agreement {found.top1_agreement or 0.0:.1%}"
    return f"{figures}, perplexity {shown(found.perplexity, 3)} ({found.tokens} held-out tokens)"


def evaluation_table(rows: Sequence[tuple[str, Evaluation]]) -> Table:
    """Figures of one or more directories, each followed by its domains."""
    table = Table("directory", title="Evaluation", box=box.SIMPLE)
    for name in ("perplexity", "±", "tokens"):
        table.add_column(name, justify="right")
    compared = any(found.kl_divergence is not None for _, found in rows)
    for name in ("KL mean", "median", "90 %", "99 %", "top-1") if compared else ():
        table.add_column(name, justify="right")
    table.add_column("tokens/s", justify="right")
    for name, found in rows:
        table.add_row(name, *_figures(found, compared), f"{found.tokens_per_second:.0f}")
        for domain, figures in found.domains.items():
            table.add_row(f"  {domain}", *_figures(figures, compared), style="dim")
    return table


def folded(warnings: Sequence[str]) -> list[str]:
    """The first warning of each kind, with the number of others that differ only in tensor and figures."""
    kinds: dict[str, list[str]] = {}
    for text in warnings:
        kinds.setdefault(re.sub(r"\d+(\.\d+)?", "#", text.rpartition(": ")[2]), []).append(text)
    return [
        f"{first} (and {len(others)} more of this kind, all in the JSON output)" if others else first
        for first, *others in kinds.values()
    ]


def _add_warnings(table: Table, warnings: Sequence[str]) -> None:
    for warning in folded(warnings):
        table.add_row("[yellow]warning[/yellow]", escape(warning))


def _figures(found: Figures, compared: bool) -> list[str]:
    kl = (found.kl_divergence, found.kl_median, found.kl_p90, found.kl_p99, found.top1_agreement) if compared else ()
    figures = (found.perplexity, found.perplexity_se)
    cells = [shown(x, 4) if x is not None else "" for x in (*figures, *kl)]
    return [*cells[:2], str(found.tokens), *cells[2:]]


def harness_table(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Figures of each directory on each task of lm-evaluation-harness."""
    table = Table("directory", "task", "figure", "value", title="Tasks")
    for directory, tasks in figures.items():
        for task, found in tasks.items():
            for name, value in found.items():
                table.add_row(directory, task, name, f"{value:.4f}")
    return table


def inspection_table(linears: Sequence[LinearInspection]) -> Table:
    """Widths, groups and scales of linears."""
    table = Table("linear", "rows × columns", "rows by width", "groups", "bpw", "step sizes", title="Linears")
    compared = any(linear.error is not None for linear in linears)
    if compared:
        table.add_column("error", justify="right")
    for x in linears:
        widths = ", ".join(f"{bits}: {rows}" for bits, rows in x.widths.items())
        groups = ", ".join(f"{count} of {rows}" for rows, count in x.groups.items())
        steps = f"{x.scale[0]:.2e} to {x.scale[2]:.2e}" + (f", {x.subnormal:.0%} subnormal" if x.subnormal else "")
        error = [f"{x.error:.4f}"] if x.error is not None else []
        table.add_row(x.key, f"{x.rows} × {x.columns}", widths, groups, f"{x.bpw:.3f}", steps, *error)
    return table


def plan_table(plan: Preflight) -> Table:
    """The plan of a conversion: sizes, resources, warnings and refusals."""
    table = _two_columns("Plan")
    table.add_row("bits per weight", f"{plan.low_bpw:.4f} to {plan.high_bpw:.4f} can be reached, asked {plan.bits:g}")
    size = f"{plan.output_size / MEGABYTE:.1f} MB (source {plan.source_size / MEGABYTE:.1f} MB)"
    table.add_row("output", size if plan.output_exact else f"at most {size}")
    table.add_row("disk", f"{plan.disk / MEGABYTE:.1f} MB needed, {plan.disk_free / MEGABYTE:.1f} MB free")
    table.add_row("memory", f"about {plan.memory / MEGABYTE:.0f} MB, {plan.memory_present / MEGABYTE:.0f} MB present")
    for name, time in plan.durations.items():
        said = (
            f"about {time.seconds:.0f} s, between {time.least:.0f} and {time.most:.0f} s on this machine as it is now"
        )
        table.add_row(f"time, {name}", said)
    for name, tokens in plan.calibration_tokens.items():
        table.add_row(f"calibration, {name} pass", f"{tokens} tokens")
    _add_warnings(table, plan.warnings)
    for refusal in plan.refused:
        table.add_row("[red]would be refused[/red]", refusal)
    return table


def device_table(found: DeviceEstimate) -> Table:
    """Memory and time on a device, counted."""
    table = _two_columns(f"{found.device}: counted, not measured")
    fits = "" if found.fits else ": too much"
    table.add_row(
        "device memory", f"{found.memory / GIGABYTE:.1f} GB of {found.memory_present / GIGABYTE:.0f} GB{fits}"
    )
    stay = "stay on the device" if found.streams_fit else "cross the bus for every module"
    table.add_row("hidden states", f"{found.streams / GIGABYTE:.1f} GB, {stay}")
    table.add_row("weights and states up", f"{found.bytes_up / GIGABYTE:.1f} GB")
    if found.launches:
        table.add_row("launches", f"{found.launches / 1e6:.2f} million")
    for name, work in found.work.items():
        operations = ", ".join(f"{1e-12 * amount:.4g} {kind}" for kind, amount in work.items())
        table.add_row(f"tera-operations, {name}", operations)
    for name, seconds in found.seconds.items():
        table.add_row(f"seconds, {name}", f"{seconds:.1f}")
    table.add_row("time at published rates", f"at least {found.total / 60:.3g} minutes; most of it: {found.bound}")
    return table


def verify_table(report: VerifyReport) -> Table:
    """Every fault of an EXL2 directory, or its figures where there is none."""
    if report.ok:
        table = _two_columns("Verified: no fault")
        table.add_row("linears", str(report.linears))
        table.add_row("bits per weight", f"{report.bits_per_weight:.4f}")
        table.add_row("size", f"{report.bytes / MEGABYTE:.1f} MB")
        return table
    table = Table("tensor or file", "fault", title=f"{len(report.faults)} faults")
    for fault in report.faults:
        table.add_row(fault.tensor, fault.message)
    return table


def calibration_table(summary: CalibrationSummary) -> Table:
    """The content of calibration rows."""
    table = _two_columns("Calibration")
    table.add_row("source", summary.source)
    table.add_row("rows", f"{summary.rows} of {summary.length} tokens, {summary.tokens} tokens in all")
    for domain, rows in summary.composition.items():
        table.add_row(f"rows, {domain}", str(rows))
    table.add_row("vocabulary", f"{summary.vocabulary_used} of {summary.vocabulary_size} ({summary.coverage:.1%})")
    table.add_row("duplicate rows", str(summary.duplicates))
    table.add_row("first tokens", repr(summary.first))
    table.add_row("last tokens", repr(summary.last))
    table.add_row("sha256", summary.sha256)
    for note in summary.notes:
        table.add_row("[yellow]note[/yellow]", note)
    return table


def _two_columns(title: str) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
