"""Summaries as tables."""

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from exl2jax.calibration import CalibrationSummary
from exl2jax.evaluate import Evaluation
from exl2jax.evaluate.verify import VerifyReport
from exl2jax.pipeline.result import ConversionResult

MEGABYTE = 1e6


def conversion_table(result: ConversionResult) -> Table:
    """What a conversion made."""
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
            "calibration perplexity", f"{result.perplexity:.3f} (full precision {result.perplexity_full:.3f})"
        )
    for name, errors in (("mean rfn_error", result.rfn_error), ("mean stream error", result.stream_error)):
        if errors:
            table.add_row(name, f"{fmean(errors.values()):.5f}")
    for stage, seconds in (result.seconds or {}).items():
        table.add_row(f"seconds, {stage}", f"{seconds:.1f}")
    for warning in result.warnings:
        table.add_row("[yellow]warning[/yellow]", warning)
    return table


def evaluation_table(rows: Sequence[tuple[str, Evaluation]]) -> Table:
    """Figures of one or more directories."""
    table = Table("directory", "perplexity", "tokens", "KL to reference", "top-1 agreement", title="Evaluation")
    for name, found in rows:
        table.add_row(
            name,
            f"{found.perplexity:.4f}",
            str(found.tokens),
            "" if found.kl_divergence is None else f"{found.kl_divergence:.4f}",
            "" if found.top1_agreement is None else f"{found.top1_agreement:.4f}",
        )
    return table


def verify_table(report: VerifyReport) -> Table:
    """Every fault of an EXL2 directory, or that there is none."""
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
    """What calibration rows hold."""
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
