"""The passes of a conversion over the modules of its model: checkpointed scans that write their results to disk.

`price` computes costs from the Fisher information that `exl2jax.conversion.gradient_passes` found. `measure` is stock's
measurement of every candidate. `quantize` writes the packed linears.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from exl2jax.allocate.strategy import Strategy
from exl2jax.calibration import CalibrationRows
from exl2jax.conversion.context import Context
from exl2jax.conversion.scans import Codec, Pass, TokenRows, embedded, placed_rows, spread_rows
from exl2jax.conversion.shown import shown
from exl2jax.errors import JobError, NumericalError
from exl2jax.measure.accuracy import MeasureStep
from exl2jax.measure.costs import PriceStep
from exl2jax.measure.measurement import Candidate, Measurement, read_measurement, read_sensitivity
from exl2jax.measure.sensitivity import LinearCosts, Sensitivity
from exl2jax.models import LinearSpec, ModuleSpec, head_spec
from exl2jax.quantize.outputs import read_output_gradients
from exl2jax.quantize.report import ModuleReport
from exl2jax.quantize.step import QuantizeStep
from exl2jax.storage import make_directory, read_checked_tensors, read_json, remove, write_json
from exl2jax.stream.later import working_behind
from exl2jax.stream.scan import STATES
from exl2jax.variants.recipe import Recipe

LINEARS_SHOWN = 8
"""Linears of a module whose widths the progress shows; a mixture of experts has hundreds."""

CHECK_ROWS = 16
"""Rows of the final check where `measurement_rows` is not set; stock's default."""


def price_pass(context: Context, rows: CalibrationRows) -> None:
    """Write the measurement: the cost of each linear's error."""
    every = TokenRows.of(rows)
    placed = placed_rows(context, every)
    weights = context.work.scaled_fisher if context.recipe.divergence_rows else context.work.fisher
    remove(context.work.module_inputs)  # the job file says that the passes which read it are done
    Pass(
        name="price",
        step=PriceStep(
            decoder=context.fast_decoder,
            rows=placed,
            fisher=read_checked_tensors(weights)[0],
            routed_only=context.config.routed_only,
            quantizer=context.recipe.quantizer,
        ),
        specs=context.specs,
        start=partial(embedded, context, every),
        codec=_costs_codec(context, len(spread_rows(rows, context.recipe.fisher_rows).input_ids)),
        place=placed.place,
        describe=lambda spec, found: f"{spec.key}: {_price_range(found)}",
    ).run(context)


def accuracy_pass(context: Context, rows: CalibrationRows) -> None:
    """Write stock's measurement, the accuracy of every candidate of every module, beside the costs if there are any."""
    every = TokenRows.of(rows)
    placed = placed_rows(context, every)
    Pass(
        name="measure",
        step=MeasureStep(
            decoder=context.decoder,
            rows=placed,
            routed_only=context.config.routed_only,
            quantizer=context.recipe.quantizer,
            table=context.recipe.measured_table,
            of_rows=context.recipe.error_of_rows,
        ),
        specs=context.specs,
        start=partial(embedded, context, every),
        codec=_accuracies_codec(context),
        place=placed.place,
        describe=lambda spec, found: f"{spec.key}: {_error_range(found)}",
    ).run(context)


def quantize_pass(
    context: Context, rows: CalibrationRows, strategy: Strategy, token_weights: Mapping[str, np.ndarray]
) -> None:
    """Write the packed tensors of every linear and a report of every module to the work directory.

    `token_weights` are weights of the token classes by key of a linear, empty where all tokens count alike.
    """
    remove(context.work.module_inputs)  # as in `price_pass`
    make_directory(context.work.out_tensor, "the work directory")
    every = TokenRows.of(rows)
    placed = placed_rows(context, every, streams=3 if context.recipe.carries_reference else 2)
    with working_behind() as behind:
        step = QuantizeStep(
            decoder=context.fast_decoder,
            recipe=context.recipe,
            strategy=strategy.qparams,
            token_weights=token_weights,
            head_bits=context.config.head_bits,
            input_ids=rows.input_ids,
            rows=placed,
            out_tensor=context.work.out_tensor,
            check_rows=context.config.measurement_rows or CHECK_ROWS,
            routed_only=context.config.routed_only,
            seed=context.config.seed,
            later=behind,
            outputs=partial(read_output_gradients, context.work.outputs) if context.recipe.output_rows else None,
        )

        def write(reports: Sequence[ModuleReport]) -> None:
            behind.settle()  # the linears of these reports are written before them
            write_json(context.work.reports, [report.to_json() for report in reports])

        _, reports = Pass(
            name="quantize",
            step=step,
            specs=(*context.specs, head_spec(context.model.config)),
            start=lambda: step.start(embedded(context, every)[STATES]),
            codec=Codec(write, partial(read_reports, context)),
            place=placed.place,
            describe=lambda spec, report: _describe(spec, report, strategy),
        ).run(context)
    if not math.isfinite(reports[-1].perplexity or math.nan):
        raise NumericalError("lm_head: the calibration perplexity of the quantized model is not finite")


def read_reports(context: Context, count: int | None = None) -> list[ModuleReport]:
    """The reports of the first `count` modules of the quantization pass, or of all."""
    path = context.work.reports
    records = read_json(path, JobError, "the quantization report")
    try:
        return [ModuleReport.from_json(record) for record in records[:count]]
    except (TypeError, KeyError) as e:
        raise JobError(f"{path}: not a quantization report ({e}); start over with `no_resume`") from e


def _error_range(found: Mapping[str, Sequence[Candidate]]) -> str:
    errors = [candidate.error for rows in found.values() for candidate in rows]
    return f"error {min(errors):.4f} to {max(errors):.4f}"


def _costs_codec(context: Context, fisher_rows: int) -> Codec[dict[str, LinearCosts]]:
    """Costs of linears, kept in the measurement file."""
    path, specs, recipe = context.work.measurement, context.specs, context.recipe

    def write(outputs: Sequence[dict[str, LinearCosts]]) -> None:
        linears = {key: costs for found in outputs for key, costs in found.items()}
        sensitivity = Sensitivity(method=_method(recipe), rows=fisher_rows, linears=linears)
        Measurement(sensitivity=sensitivity, method=recipe.measured_by).write(path, specs)

    def read(count: int) -> list[dict[str, LinearCosts]]:
        found = read_measurement(path, specs, partial=count).sensitivity
        if found is None:
            raise JobError(f"{path}: not the measurement that was begun here; start over with `no_resume`")
        return [{x.key: found.linears[x.key] for x in spec.linears} for spec in specs[:count]]

    return Codec(write, read)


def _accuracies_codec(context: Context) -> Codec[dict[str, tuple[Candidate, ...]]]:
    """Accuracies of candidates, kept in the measurement file beside the costs that it already holds."""
    path, specs, recipe = context.work.measurement, context.specs, context.recipe
    sensitivity = read_sensitivity(path, specs) if recipe.pricing != "accuracy" else None

    def write(outputs: Sequence[dict[str, tuple[Candidate, ...]]]) -> None:
        modules = {key: rows for found in outputs for key, rows in found.items()}
        Measurement(modules=modules, sensitivity=sensitivity, method=recipe.measured_by).write(path, specs)

    def read(count: int) -> list[dict[str, tuple[Candidate, ...]]]:
        known = read_measurement(path, specs, partial=count).modules
        return [{slot.key: known[slot.key] for slot in spec.slots} for spec in specs[:count]]

    return Codec(write, read)


def _method(recipe: Recipe) -> str:
    """The source of the costs, in words for the measurement file."""
    if recipe.pricing == "divergence":
        return "relative errors of linears, scaled by the measured divergence of perturbing each module alone"
    scaled = ", scaled by the measured divergence of perturbing each module alone" if recipe.divergence_rows else ""
    weighed = ", tokens weighed by class" if recipe.weigh_tokens else ""
    return f"Fisher information of output columns, labels sampled from the model{weighed}{scaled}"


def _price_range(found: Mapping[str, LinearCosts]) -> str:
    """The cost of the module with all its linears at 4 and at 2 bits."""
    wide, narrow = (sum(float(c.measured[bits, 128].sum()) for c in found.values()) for bits in (4, 2))
    return f"{wide:.2e} nats at 4 bits, {narrow:.2e} at 2"


def _describe(spec: ModuleSpec | LinearSpec, report: ModuleReport, strategy: Strategy) -> str:
    if isinstance(spec, LinearSpec):
        full = f"full precision {shown(report.perplexity_full or math.nan, 3)}"
        return f"{report.key}: calibration perplexity {shown(report.perplexity or math.nan, 3)} ({full})"
    error = (
        f"rfn_error {report.rfn_error:.5f}"
        if report.rfn_error is not None
        else f"stream error {report.stream_error:.5f}"
    )
    if report.tuning is not None:
        error += ", held-out error {before:.3e} tuned to {after:.3e}".format(**report.tuning)
    settings = {name: q for slot in spec.slots for name, q in strategy.qparams[slot.key].items()}
    widths = ", ".join(f"{n} {'/'.join(map(str, q.bits))}" for n, q in list(settings.items())[:LINEARS_SHOWN])
    return f"{report.key}: {error} ({widths})"
