"""The passes of a conversion over the modules of its model: checkpointed scans that write their results to disk.

`forward` and `backward` compute the Fisher information, `perturb` scales it by measured divergences, `price` computes
the costs from it. `measure` is stock's measurement of every candidate. `quantize` writes the packed linears.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exl2jax.allocate.strategy import Strategy
from exl2jax.calibration import CalibrationRows
from exl2jax.conversion.context import Context
from exl2jax.conversion.shown import shown
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
from exl2jax.stream.chunks import full_mask
from exl2jax.stream.forward import embed
from exl2jax.stream.later import working_behind
from exl2jax.stream.scan import GRADIENT, PERTURBED, STATES, Carry, HostCarry, streams_by
from exl2jax.stream.streams import Rows, Stream, device_budget
from exl2jax.variants.recipe import Recipe

LINEARS_SHOWN = 8
"""Linears of a module whose widths the progress shows; a mixture of experts has hundreds."""

CHECK_ROWS = 16
"""Rows of the final check where `measurement_rows` is not set; stock's default."""

PREDICTED = "predicted"
"""Name of the predicted divergences in the file of perturbations."""


class Codec[O](NamedTuple):
    """The form of a pass's outputs on disk; `read(count)` returns the first `count`."""

    write: Callable[[Sequence[O]], None]
    read: Callable[[int], list[O]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass[O]:
    """A pass over modules: its step, its modules, its first carry, the codec of its outputs, the placing of streams.

    `last` names the streams that are read after the last module.
    """

    name: str
    step: Callable[[Carry, Any], tuple[Carry, O]]
    specs: Sequence[ModuleSpec | LinearSpec]
    start: Callable[[], HostCarry]
    codec: Codec[O]
    place: Callable[[np.ndarray], Stream]
    last: Sequence[str] = ()
    describe: Callable[[Any, O], str] = lambda spec, _: spec.key

    def run(self, context: Context) -> tuple[Carry, list[O]]:
        """Run the step on every module, from the last checkpoint on, and write all outputs."""
        carry, outputs = context.scan(
            self.name,
            self.step,
            self.start,
            self.specs,
            form=streams_by(self.place, self.last),
            describe=self.describe,
            write=self.codec.write,
            read=self.codec.read,
        )
        self.codec.write(outputs)
        return carry, outputs


def forward_pass(context: Context, rows: CalibrationRows) -> None:
    """Write the full-precision input of every module on a few calibration rows."""
    picked = _fisher_rows(context, rows)
    stack = _input_stack(context, picked.input_ids)
    if stack.fresh:
        remove(context.work.hidden_states)  # a checkpoint is of no use without the inputs before it

    def start() -> HostCarry:
        carry = _embedded(context, picked)
        stack.write(0, carry[STATES])
        return carry

    Pass(
        name="forward",
        step=ForwardStep(decoder=context.decoder, stack=stack),
        specs=context.specs,
        start=start,
        codec=Codec(lambda _: stack.flush(), lambda count: [None] * count),
        place=_rows(context, picked).place,
    ).run(context)


def backward_pass(context: Context, rows: CalibrationRows) -> None:
    """Write the Fisher information of every linear's columns to the work directory."""
    picked = _fisher_rows(context, rows)
    stack = _input_stack(context, picked.input_ids)
    if stack.fresh:
        raise JobError(
            f"{context.work.module_inputs}: the result of the forward pass is gone; start over with `no_resume`"
        )
    specs, single = context.specs[::-1], _rows(context, picked, single=True)

    def start() -> HostCarry:
        head = context.model.head_params()
        return {GRADIENT: head_gradients(context.decoder, head, stack.final(), picked.mask, seed=context.config.seed)}

    Pass(
        name="backward",
        step=BackwardStep(
            decoder=context.decoder,
            stack=stack,
            rows=single,
            tokens=int(picked.mask.sum(dtype=np.int64)),
            weigh=context.recipe.weigh_tokens,
        ),
        specs=specs,
        start=start,
        codec=_columns_codec(context.work.fisher, specs),
        place=single.place,
    ).run(context)


def perturb_pass(context: Context, rows: CalibrationRows) -> None:
    """Scale the Fisher information by the measured divergence of perturbing each module alone."""
    picked = _fisher_rows(context, rows)
    step = PerturbStep(
        decoder=context.decoder,
        stack=_input_stack(context, picked.input_ids),
        rows=min(context.recipe.divergence_rows, len(picked.input_ids)),
        fisher=_read_all(context.work.fisher) if context.recipe.pricing == "fisher" else None,
    )
    carry, found = Pass(
        name="perturb",
        step=step,
        specs=context.specs,
        start=lambda: step.start(len(context.specs)),
        codec=Codec(partial(_write_perturbations, context), partial(_read_perturbations, context)),
        place=step.place,
        last=(PERTURBED,),
        describe=lambda spec, found: f"{spec.key}: {found.predicted:.2e} nats predicted",
    ).run(context)
    reference, mask = step.stack.final()[: step.rows], picked.mask[: step.rows]
    measured = divergences(context.decoder, context.model.head_params(), carry[PERTURBED].array(), reference, mask)
    write_checked_tensors(context.work.scaled_fisher, _by_key(context.specs, scaled(found, measured)))


def price_pass(context: Context, rows: CalibrationRows) -> None:
    """Write the measurement: the cost of each linear's error."""
    every = PassRows.of(rows)
    placed = _rows(context, every)
    weights = context.work.scaled_fisher if context.recipe.divergence_rows else context.work.fisher
    remove(context.work.module_inputs)  # the job file says that the passes which read it are done
    Pass(
        name="price",
        step=PriceStep(
            decoder=context.fast_decoder,
            rows=placed,
            fisher=_read_all(weights),
            routed_only=context.config.routed_only,
            quantizer=context.recipe.quantizer,
        ),
        specs=context.specs,
        start=partial(_embedded, context, every),
        codec=_costs_codec(context, len(_fisher_rows(context, rows).input_ids)),
        place=placed.place,
        describe=lambda spec, found: f"{spec.key}: {_price_range(found)}",
    ).run(context)


def accuracy_pass(context: Context, rows: CalibrationRows) -> None:
    """Write stock's measurement, the accuracy of every candidate of every module, beside the costs if there are any."""
    every = PassRows.of(rows)
    placed = _rows(context, every)
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
        start=partial(_embedded, context, every),
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
    make_directory(context.work.out_tensor, "the work directory")
    every = PassRows.of(rows)
    placed = _rows(context, every, streams=3 if context.recipe.carries_reference else 2)
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
        )

        def write(reports: Sequence[ModuleReport]) -> None:
            behind.settle()  # the linears of these reports are written before them
            write_json(context.work.reports, [report.to_json() for report in reports])

        _, reports = Pass(
            name="quantize",
            step=step,
            specs=(*context.specs, head_spec(context.model.config)),
            start=lambda: step.start(_embedded(context, every)[STATES]),
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


class PassRows(NamedTuple):
    """Token rows of a pass `[R, T]`, and their mask: 0 for padding, 1 for tokens that count."""

    input_ids: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(cls, rows: CalibrationRows) -> "PassRows":
        """All calibration rows."""
        return cls(rows.input_ids, full_mask(rows.input_ids.shape, rows.attention_mask))


def _fisher_rows(context: Context, rows: CalibrationRows) -> PassRows:
    """Rows of the backward pass, spread evenly over the calibration rows and so over their domains."""
    count = min(context.recipe.fisher_rows, len(rows.input_ids))
    picked = (2 * np.arange(count) + 1) * len(rows.input_ids) // (2 * count)
    return PassRows(*(values[picked] for values in PassRows.of(rows)))


def _rows(context: Context, rows: PassRows, *, streams: int = 2, single: bool = False) -> Rows:
    """The rows in the chunks of a pass; states stay on the device where this many `streams` fit."""
    width, budget = context.model.config.hidden_size, device_budget(context.config.device_memory)
    resident = budget is None or streams * rows.input_ids.size * width * 4 <= budget
    return Rows.of(rows.mask, width, single=single, resident=resident)


def _embedded(context: Context, rows: PassRows) -> HostCarry:
    """The carry of a pass over hidden states before the first module."""
    return {STATES: embed(context.model, rows.input_ids, context.config.seed)}


def _input_stack(context: Context, ids: np.ndarray) -> InputStack:
    shape = (*ids.shape, context.model.config.hidden_size)
    return InputStack(context.work.module_inputs, context.specs, shape)


def _columns_codec(path: Path, specs: Sequence[ModuleSpec]) -> Codec[Columns]:
    """Columns of modules, kept in a file of tensors."""

    def read(count: int) -> list[Columns]:
        known = _read_all(path)
        return [columns_by_name(spec, known) for spec in specs[:count]]

    return Codec(lambda outputs: write_checked_tensors(path, _by_key(specs, outputs)), read)


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
