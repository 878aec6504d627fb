"""The passes of a conversion over the modules of its model, each a checkpointed scan that leaves its result on disk.

`forward` and `backward` find the Fisher information, `perturb` scales it by measured divergences, `price` finds the
costs that follow from it; `measure` is stock's exact measurement of every candidate; `quantize` writes the packed
linears.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from exl2jax.allocate.strategy import Strategy
from exl2jax.calibration import CalibrationRows
from exl2jax.conversion.context import Context
from exl2jax.errors import JobError, NumericalError
from exl2jax.measure.accuracy import MeasureStep
from exl2jax.measure.costs import PriceStep
from exl2jax.measure.fisher import BackwardStep, Columns, columns_by_key, columns_by_name, head_gradients
from exl2jax.measure.inputs import ForwardStep, InputStack
from exl2jax.measure.measurement import Candidate, Measurement, read_measurement, read_sensitivity
from exl2jax.measure.perturb import Perturbation, PerturbStep, divergences, scaled
from exl2jax.measure.sensitivity import LinearCosts, Sensitivity
from exl2jax.models import LinearSpec, ModuleSpec, head_spec
from exl2jax.quantize.report import ModuleReport
from exl2jax.quantize.step import QuantizeStep
from exl2jax.storage import make_directory, read_checked_tensors, read_json, remove, write_checked_tensors, write_json
from exl2jax.stream.forward import embed
from exl2jax.stream.scan import GRADIENT, PERTURBED, STATES, Carry
from exl2jax.variants.recipe import Recipe

LINEARS_SHOWN = 8
"""Linears of a module whose widths the progress shows; a mixture of experts has hundreds."""

CHECK_ROWS = 16
"""Rows of the final check where `measurement_rows` says nothing; stock's default."""

PREDICTED = "predicted"
"""Tensor beside the columns' weights in the file of perturbations."""


def forward_pass(context: Context, rows: CalibrationRows) -> None:
    """Keep the full-precision input of every module on a few calibration rows."""
    picked = _fisher_rows(context, rows)
    stack = _input_stack(context, rows.input_ids[picked])
    if stack.fresh:
        remove(context.work.hidden_states)  # a checkpoint without the inputs before it is worth nothing
    context.scan(
        "forward",
        ForwardStep(decoder=context.decoder, stack=stack),
        lambda: {STATES: embed(context.model, rows.input_ids[picked], context.config.seed)},
        context.specs,
        describe=lambda spec, _: spec.key,
        write=lambda _: stack.flush(),
        read=lambda count: [None] * count,
    )
    stack.flush()


def backward_pass(context: Context, rows: CalibrationRows) -> None:
    """Leave the Fisher information of every linear's columns in the work directory."""
    picked = _fisher_rows(context, rows)
    mask = None if rows.attention_mask is None else rows.attention_mask[picked]
    stack = _input_stack(context, rows.input_ids[picked])
    if stack.fresh:
        raise JobError(f"{context.work.module_inputs}: what the forward pass left is gone; start over with `no_resume`")
    tokens = rows.input_ids[picked].size if mask is None else int(mask.sum())
    specs = context.specs[::-1]

    def write(outputs: Sequence[Columns]) -> None:
        write_checked_tensors(context.work.fisher, _by_key(specs, outputs))

    def read(count: int) -> list[Columns]:
        known = _read_all(context.work.fisher)
        return [columns_by_name(spec, known) for spec in specs[:count]]

    def start() -> Carry:
        gradient = head_gradients(
            context.decoder, context.model.head_params(), stack.final(), mask, seed=context.config.seed
        )
        return {GRADIENT: gradient}

    _, outputs = context.scan(
        "backward",
        BackwardStep(decoder=context.decoder, stack=stack, tokens=tokens, mask=mask, weigh=context.recipe.weigh_tokens),
        start,
        specs,
        describe=lambda spec, _: spec.key,
        write=write,
        read=read,
    )
    write(outputs)


def perturb_pass(context: Context, rows: CalibrationRows) -> None:
    """Scale what the backward pass left by the measured divergence of perturbing each module alone."""
    picked = _fisher_rows(context, rows)
    step = PerturbStep(
        decoder=context.decoder,
        stack=_input_stack(context, rows.input_ids[picked]),
        rows=min(context.recipe.divergence_rows, len(picked)),
        fisher=_read_all(context.work.fisher) if context.recipe.pricing == "fisher" else None,
    )
    mask = None if rows.attention_mask is None else rows.attention_mask[picked[: step.rows]]
    carry, found = context.scan(
        "perturb",
        step,
        lambda: step.start(len(context.specs)),
        context.specs,
        describe=lambda spec, found: f"{spec.key}: {found.predicted:.2e} nats predicted",
        write=partial(_write_perturbations, context),
        read=partial(_read_perturbations, context),
    )
    reference = step.stack.final()[: step.rows]
    measured = divergences(context.decoder, context.model.head_params(), carry[PERTURBED], reference, mask)
    write_checked_tensors(context.work.scaled_fisher, _by_key(context.specs, scaled(found, measured)))


def price_pass(context: Context, rows: CalibrationRows) -> None:
    """Write the measurement of what each linear's error costs."""
    fisher_rows = len(_fisher_rows(context, rows))
    method = _method(context.recipe)
    weights = context.work.scaled_fisher if context.recipe.divergence_rows else context.work.fisher
    remove(context.work.module_inputs)  # the job file says by now that the passes which read it are done

    def write(outputs: Sequence[dict[str, LinearCosts]]) -> None:
        linears = {key: costs for found in outputs for key, costs in found.items()}
        sensitivity = Sensitivity(method=method, rows=fisher_rows, linears=linears)
        Measurement(sensitivity=sensitivity, method=context.recipe.measured_by).write(
            context.work.measurement, context.specs
        )

    def read(count: int) -> list[dict[str, LinearCosts]]:
        found = read_measurement(context.work.measurement, context.specs, partial=count).sensitivity
        if found is None:
            raise JobError(
                f"{context.work.measurement}: not the measurement that was begun here; start over with `no_resume`"
            )
        return [{x.key: found.linears[x.key] for x in spec.linears} for spec in context.specs[:count]]

    _, outputs = context.scan(
        "price",
        PriceStep(
            decoder=context.decoder,
            mask=rows.attention_mask,
            fisher=_read_all(weights),
            routed_only=context.config.routed_only,
            method=context.recipe.method,
        ),
        lambda: {STATES: embed(context.model, rows.input_ids, context.config.seed)},
        context.specs,
        describe=lambda spec, found: f"{spec.key}: {_price_range(found)}",
        write=write,
        read=read,
    )
    write(outputs)


def accuracy_pass(context: Context, rows: CalibrationRows) -> None:
    """Write stock's measurement: the accuracy of every candidate of every module, beside the costs if there are any."""
    path = context.work.measurement
    priced = context.recipe.pricing != "accuracy"
    sensitivity = read_sensitivity(path, context.specs) if priced else None

    def write(outputs: Sequence[dict[str, tuple[Candidate, ...]]]) -> None:
        modules = {key: rows for found in outputs for key, rows in found.items()}
        Measurement(modules=modules, sensitivity=sensitivity, method=context.recipe.measured_by).write(
            path, context.specs
        )

    def read(count: int) -> list[dict[str, tuple[Candidate, ...]]]:
        known = read_measurement(path, context.specs, partial=count).modules
        return [{slot.key: known[slot.key] for slot in spec.slots} for spec in context.specs[:count]]

    _, outputs = context.scan(
        "measure",
        MeasureStep(
            decoder=context.decoder,
            mask=rows.attention_mask,
            routed_only=context.config.routed_only,
            method=context.recipe.method,
            table=context.recipe.measured_table,
            of_rows=context.recipe.error_of_rows,
        ),
        lambda: {STATES: embed(context.model, rows.input_ids, context.config.seed)},
        context.specs,
        describe=lambda spec, found: f"{spec.key}: {_error_range(found)}",
        write=write,
        read=read,
    )
    write(outputs)


def quantize_pass(
    context: Context, rows: CalibrationRows, strategy: Strategy, token_weights: Mapping[str, np.ndarray]
) -> None:
    """Leave the packed tensors of every linear in the work directory, and a report of every module.

    `token_weights` are those of the classes of tokens by key of a linear, none where all count alike.
    """
    make_directory(context.work.out_tensor, "the work directory")
    step = QuantizeStep(
        decoder=context.decoder,
        recipe=context.recipe,
        strategy=strategy.qparams,
        token_weights=token_weights,
        head_bits=context.config.head_bits,
        input_ids=rows.input_ids,
        mask=rows.attention_mask,
        out_tensor=context.work.out_tensor,
        check_rows=context.config.measurement_rows or CHECK_ROWS,
        routed_only=context.config.routed_only,
        seed=context.config.seed,
    )
    write = partial(_write_reports, context)
    _, reports = context.scan(
        "quantize",
        step,
        lambda: step.start(embed(context.model, rows.input_ids, context.config.seed)),
        (*context.specs, head_spec(context.model.config)),
        describe=lambda spec, report: _describe(spec, report, strategy),
        write=write,
        read=partial(read_reports, context),
    )
    write(reports)
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


def _write_reports(context: Context, reports: Sequence[ModuleReport]) -> None:
    write_json(context.work.reports, [report.to_json() for report in reports])


def _error_range(found: Mapping[str, Sequence[Candidate]]) -> str:
    errors = [candidate.error for rows in found.values() for candidate in rows]
    return f"error {min(errors):.4f} to {max(errors):.4f}"


def _fisher_rows(context: Context, rows: CalibrationRows) -> np.ndarray:
    """Indices of the rows of the backward pass, spread evenly over the calibration rows and so over its domains."""
    count = min(context.recipe.fisher_rows, len(rows.input_ids))
    return (2 * np.arange(count) + 1) * len(rows.input_ids) // (2 * count)


def _input_stack(context: Context, ids: np.ndarray) -> InputStack:
    shape = (*ids.shape, context.model.config.hidden_size)
    return InputStack(context.work.module_inputs, context.specs, shape)


def _by_key(specs: Sequence[ModuleSpec], outputs: Sequence[Columns]) -> dict[str, np.ndarray]:
    """Columns of the first modules of `specs`, and weights of tokens, by the keys of their linears."""
    pairs = zip(specs, outputs, strict=False)
    return {key: value for spec, found in pairs for key, value in columns_by_key(spec, found).items()}


def _read_all(path: Path) -> Mapping[str, np.ndarray]:
    """Every tensor of a file."""
    return read_checked_tensors(path)[0]


def _write_perturbations(context: Context, found: Sequence[Perturbation]) -> None:
    predicted = {PREDICTED: np.asarray([p.predicted for p in found])}
    write_checked_tensors(context.work.perturbations, predicted | _by_key(context.specs, [p.columns for p in found]))


def _read_perturbations(context: Context, count: int) -> list[Perturbation]:
    known = _read_all(context.work.perturbations)
    return [
        Perturbation(columns=columns_by_name(spec, known), predicted=float(known[PREDICTED][i]))
        for i, spec in enumerate(context.specs[:count])
    ]


def _method(recipe: Recipe) -> str:
    """What the costs rest on, in words for the measurement file."""
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
        full = f"full precision {report.perplexity_full:.3f}"
        return f"{report.key}: calibration perplexity {report.perplexity:.3f} ({full})"
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
