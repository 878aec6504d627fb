"""The records that a finished conversion leaves: its summary, its allocation, and the `quantization_config`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exl2jax.allocate.allocate import by_rows, unspent_note
from exl2jax.allocate.strategy import Strategy
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.context import Context
from exl2jax.conversion.refusals import lasting_notes
from exl2jax.conversion.result import ConversionResult, perplexity_warnings
from exl2jax.conversion.work_directory import JobState
from exl2jax.models.transform import transform_record
from exl2jax.quantize.diagnostics import overflow_warnings
from exl2jax.quantize.report import ModuleReport
from exl2jax.version import VERSION

STOCK_VERSION = "0.3.2"
"""The ExLlamaV2 whose format is written."""

WEAKER = (
    "the measurement holds stock's accuracies only: bits were allocated by them, a weaker guide than the preset's own"
)

OTHER_METHOD = (
    "the measurement was made with other variants ({measured}) than the linears are quantized with ({own}): "
    "errors may differ from those that bits were allocated by"
)


def summarize(
    context: Context, state: JobState, target: Path, shards: Sequence[Path], reports: Sequence[ModuleReport]
) -> ConversionResult:
    """The summary of a conversion from its module reports, the head's last, and the records of its job."""
    config = context.config
    *modules, head = reports
    weights = sum(spec.weights for spec in context.specs)
    notes = [n for c in state.records.get("calibration", {}).values() for n in c.get("notes", [])]
    strategy = state.records["strategy"]
    weaker = [WEAKER] if strategy["pricing"] == "accuracy" and context.recipe.pricing != "accuracy" else []
    measured_by, own = strategy["measured_by"], context.recipe.measured_by
    differs = measured_by != own and not weaker
    other = [OTHER_METHOD.format(measured=measured_by or "stock's", own=own or "stock's")] if differs else []
    bpw, rows = sum(r.bits for r in modules) / weights, by_rows(strategy["pricing"], context.recipe.table)
    unspent = unspent_note(bpw, config.bits, context.specs, rows=rows)
    found = [*lasting_notes(context), *([unspent] if unspent else [])]
    diagnostics = [line for report in reports for line in report.diagnostics]
    peaks = [(x.key, x.largest_state or 0.0, x.largest_output or 0.0) for x in reports]
    diagnostics += overflow_warnings(peaks, wide_residual=context.model.config.arch.wide_residual)
    tuned = state.records.get("tuned") or {}
    untuned = [tuned["reason"]] if "reason" in tuned else []
    judged = perplexity_warnings(head.perplexity or math.nan, head.perplexity_full or 0.0)
    return ConversionResult(
        output=str(target),
        bits=config.bits,
        preset=context.recipe.name,
        bpw=bpw,
        head_bits=config.head_bits,
        size=sum(path.stat().st_size for path in shards),
        source_size=sum(path.stat().st_size for path in context.model.files.files),
        perplexity=head.perplexity,
        perplexity_full=head.perplexity_full,
        rfn_error={r.key: r.rfn_error for r in modules if r.rfn_error is not None},
        stream_error={r.key: r.stream_error for r in modules if r.stream_error is not None},
        allocation=strategy,
        calibration=state.records.get("calibration"),
        seconds=state.records.get("seconds"),
        tuned=state.records.get("tuned"),
        warnings=(
            *found,
            *untuned,
            *judged,
            *weaker,
            *other,
            *diagnostics,
            *notes,
        ),
    )


def strategy_record(strategy: Strategy, measured_by: str) -> dict[str, Any]:
    """The allocation as the job keeps it."""
    return {
        "pricing": strategy.pricing,
        "measured_by": measured_by,
        "solver": strategy.solver,
        "bpw": strategy.bpw,
        "objective": strategy.objective,
        "gap": strategy.gap,
        "norm": strategy.norm,
        "max_error": strategy.max_error,
        "modules": {k: {n: q.to_json() for n, q in v.items()} for k, v in strategy.qparams.items()},
    }


def quantization_config(config: ConversionConfig, state: JobState) -> dict[str, Any]:
    """The section that makes a loader take the directory for an EXL2 model."""
    calibration = state.records["calibration"]["quantize"]
    return {
        "quant_method": "exl2",
        "version": STOCK_VERSION,
        "bits": config.bits,
        "head_bits": config.head_bits,
        "calibration": {
            "rows": calibration["rows"],
            "length": calibration["length"],
            "dataset": "(default)" if config.cal_dataset is None else config.cal_name,
        },
        "converter": f"exl2jax {VERSION}",
        **transform_record(config.recipe.transform),
    }
