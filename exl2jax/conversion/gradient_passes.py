"""The passes of a conversion that find gradients: forward over some rows, then backward over the modules.

`forward` and `backward` give the Fisher information, which `perturb` scales by measured divergences. `trace` and
`outputs` are the same two scans on rows of the quantization and keep the gradients at the linears' outputs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from exl2jax.calibration import CalibrationRows
from exl2jax.conversion.context import Context
from exl2jax.conversion.scans import Codec, Pass, TokenRows, embedded, placed_rows, spread_rows
from exl2jax.errors import JobError
from exl2jax.measure.fisher import BackwardStep, Columns, GradientStep, columns_by_key, columns_by_name, head_gradients
from exl2jax.measure.inputs import ForwardStep, InputStack
from exl2jax.measure.outputs import OutputStep
from exl2jax.measure.perturb import Perturbation, PerturbStep, divergences, scaled
from exl2jax.models import ModuleSpec
from exl2jax.quantize.outputs import feeds_columns, write_output_gradients
from exl2jax.storage import make_directory, read_checked_tensors, remove, write_checked_tensors
from exl2jax.stream.scan import GRADIENT, PERTURBED, STATES, HostCarry

PREDICTED = "predicted"
"""Name of the predicted divergences in the file of perturbations."""


def forward_pass(context: Context, rows: CalibrationRows) -> None:
    """Write the full-precision input of every module on a few rows of the measurement."""
    _keep_inputs(context, "forward", spread_rows(rows, context.recipe.fisher_rows))


def trace_pass(context: Context, rows: CalibrationRows) -> None:
    """Write the full-precision input of every module on some rows of the quantization."""
    _keep_inputs(context, "trace", spread_rows(rows, context.recipe.output_rows))


def backward_pass(context: Context, rows: CalibrationRows) -> None:
    """Write the Fisher information of every linear's columns to the work directory."""
    picked, specs = spread_rows(rows, context.recipe.fisher_rows), context.specs[::-1]
    step = partial(BackwardStep, tokens=int(picked.mask.sum(dtype=np.int64)), weigh=context.recipe.weigh_tokens)
    _pull_back(context, "backward", picked, step, _columns_codec(context.work.fisher, specs))


def output_pass(context: Context, rows: CalibrationRows) -> None:
    """Write gradients at the outputs of the linears to the work directory."""
    make_directory(context.work.outputs, "the work directory")
    step = partial(OutputStep, write=partial(write_output_gradients, context.work.outputs), wanted=feeds_columns)
    nothing = Codec[Columns](lambda _: None, lambda count: [{}] * count)
    _pull_back(context, "outputs", spread_rows(rows, context.recipe.output_rows), step, nothing)


def _keep_inputs(context: Context, name: str, picked: TokenRows) -> None:
    """Write the full-precision input of every module on the picked rows."""
    stack = _input_stack(context, picked.input_ids)
    if stack.fresh:
        remove(context.work.hidden_states)  # a checkpoint is of no use without the inputs before it

    def start() -> HostCarry:
        carry = embedded(context, picked)
        stack.write(0, carry[STATES])
        return carry

    Pass(
        name=name,
        step=ForwardStep(decoder=context.decoder, stack=stack),
        specs=context.specs,
        start=start,
        codec=Codec(lambda _: stack.flush(), lambda count: [None] * count),
        place=placed_rows(context, picked).place,
    ).run(context)


def _pull_back(
    context: Context, name: str, picked: TokenRows, step: Callable[..., GradientStep], codec: Codec[Columns]
) -> None:
    """Take the gradients of the log likelihood of sampled labels back through all modules."""
    stack = _input_stack(context, picked.input_ids)
    if stack.fresh:
        raise JobError(
            f"{context.work.module_inputs}: the result of the forward pass is gone; start over with `no_resume`"
        )
    single = placed_rows(context, picked, single=True)

    def start() -> HostCarry:
        head = context.model.head_params()
        return {GRADIENT: head_gradients(context.decoder, head, stack.final(), picked.mask, seed=context.config.seed)}

    Pass(
        name=name,
        step=step(decoder=context.decoder, stack=stack, rows=single),
        specs=context.specs[::-1],
        start=start,
        codec=codec,
        place=single.place,
    ).run(context)


def perturb_pass(context: Context, rows: CalibrationRows) -> None:
    """Scale the Fisher information by the measured divergence of perturbing each module alone."""
    picked = spread_rows(rows, context.recipe.fisher_rows)
    step = PerturbStep(
        decoder=context.decoder,
        stack=_input_stack(context, picked.input_ids),
        rows=min(context.recipe.divergence_rows, len(picked.input_ids)),
        fisher=read_checked_tensors(context.work.fisher)[0] if context.recipe.pricing == "fisher" else None,
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


def _input_stack(context: Context, ids: np.ndarray) -> InputStack:
    shape = (*ids.shape, context.model.config.hidden_size)
    return InputStack(context.work.module_inputs, context.specs, shape)


def _columns_codec(path: Path, specs: Sequence[ModuleSpec]) -> Codec[Columns]:
    """Columns of modules, kept in a file of tensors."""

    def read(count: int) -> list[Columns]:
        known = read_checked_tensors(path)[0]
        return [columns_by_name(spec, known) for spec in specs[:count]]

    return Codec(lambda outputs: write_checked_tensors(path, _by_key(specs, outputs)), read)


def _by_key(specs: Sequence[ModuleSpec], outputs: Sequence[Columns]) -> dict[str, np.ndarray]:
    """Columns of the first modules of `specs`, and weights of tokens, by the keys of their linears."""
    pairs = zip(specs, outputs, strict=False)
    return {key: value for spec, found in pairs for key, value in columns_by_key(spec, found).items()}


def _write_perturbations(context: Context, found: Sequence[Perturbation]) -> None:
    predicted = {PREDICTED: np.asarray([p.predicted for p in found])}
    write_checked_tensors(context.work.perturbations, predicted | _by_key(context.specs, [p.columns for p in found]))


def _read_perturbations(context: Context, count: int) -> list[Perturbation]:
    known = read_checked_tensors(context.work.perturbations)[0]
    return [
        Perturbation(columns=columns_by_name(spec, known), predicted=float(known[PREDICTED][i]))
        for i, spec in enumerate(context.specs[:count])
    ]
