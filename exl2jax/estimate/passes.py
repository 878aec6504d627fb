"""The work of every pass of a conversion, for any model from its configuration alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from exl2jax.estimate.work import (
    Work,
    attention_work,
    candidates_work,
    distinct_settings,
    factor_work,
    feedback_work,
    forward_work,
    gptq_work,
    hessian_work,
    linear_work,
)
from exl2jax.measure.sensitivity import MEASURED
from exl2jax.models import LinearSpec, ModelConfig, ModuleSpec, head_spec, module_specs
from exl2jax.quantize.end_to_end import PIECE
from exl2jax.quantize.outputs import SAMPLES, feeds_columns
from exl2jax.variants.recipe import Recipe

CHECK_ROWS = 16
"""Rows of the final check at most."""

SOLVE = 2
"""Triangular products of a solve with a factor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Rows of the two calibrations and tokens of a row; by default those of the built-in set."""

    rows: int = 115
    measurement_rows: int = 19
    length: int = 2048


def conversion_work(config: ModelConfig, recipe: Recipe, passes: Passes) -> dict[str, Work]:
    """The work of each pass of a conversion, by the pass's name, the quantization last."""
    counted: dict[str, Callable[[ModuleSpec], Work]] = {
        "forward": lambda spec: forward_work(spec, config, passes.length).times(_fisher_rows(recipe, passes)),
        "backward": lambda spec: _backward(spec, config, passes.length).times(_fisher_rows(recipe, passes)),
        "trace": lambda spec: forward_work(spec, config, passes.length).times(_output_rows(recipe, passes)),
        "outputs": lambda spec: _backward(spec, config, passes.length).times(_output_rows(recipe, passes)),
        "perturb": lambda spec: _perturb(spec, config, recipe, passes),
        "price": lambda spec: _price(spec, config, recipe, passes),
        "measure": lambda spec: _measure(spec, config, recipe, passes),
        "quantize": lambda spec: _quantize(spec, config, recipe, passes),
        "tune": lambda spec: _tune(spec, config, recipe),
    }
    specs, head = module_specs(config), head_spec(config)
    found = {name: sum(map(counted[name], specs), Work()) for name in (*recipe.passes, *recipe.quantizing_passes)}
    for name, rows in (("backward", _fisher_rows), ("outputs", _output_rows)):
        if name in found:
            found[name] += _head_gradient(head, rows(recipe, passes) * passes.length)
    if "tune" in found:
        found["tune"] += _head_gradient(head, recipe.tuned_steps * PIECE).times(2)
    found["quantize"] += _head(head, recipe, passes)
    return found


def priced(spec: ModuleSpec) -> Iterator[tuple[LinearSpec, int]]:
    """Every linear of a module with the group size of every run that prices it."""
    return ((linear, size) for linear in spec.linears for _, size in MEASURED)


def _fisher_rows(recipe: Recipe, passes: Passes) -> int:
    return min(recipe.fisher_rows, passes.measurement_rows)


def _output_rows(recipe: Recipe, passes: Passes) -> int:
    return min(recipe.output_rows, passes.rows)


def _backward(spec: ModuleSpec, config: ModelConfig, length: int) -> Work:
    """A row forward again and back: a product for the gradient of every product, two for one of two activations."""
    return forward_work(spec, config, length).times(2) + attention_work(spec, config, length)


def _perturb(spec: ModuleSpec, config: ModelConfig, recipe: Recipe, passes: Passes) -> Work:
    """The rows of all models perturbed so far, half of all modules on average, and the model's own."""
    modules = len(module_specs(config))
    return forward_work(spec, config, passes.length).times(recipe.divergence_rows * (1 + modules / 2))


def _price(spec: ModuleSpec, config: ModelConfig, recipe: Recipe, passes: Passes) -> Work:
    """A forward pass, Hessians and factors, and GPTQ of every linear at the widths that are run."""
    rows, search = passes.measurement_rows, recipe.quantizer.search
    total = forward_work(spec, config, passes.length).times(rows) + hessian_work(spec, rows * passes.length)
    walks = (gptq_work(linear.rows, linear.columns, search) for linear, _ in priced(spec))
    return sum((*_factors(spec), *walks), total)


def _measure(spec: ModuleSpec, config: ModelConfig, recipe: Recipe, passes: Passes) -> Work:
    """Stock's exact measurement: a forward pass, Hessians and factors, GPTQ and forward passes of all candidates."""
    rows, search = passes.measurement_rows, recipe.quantizer.search
    total = forward_work(spec, config, passes.length).times(rows) + hessian_work(spec, rows * passes.length)
    for slot in spec.slots:
        total += candidates_work(slot, config, passes.length).times(rows)
        for linear in slot.linears:
            settings = len(distinct_settings(slot)[linear.name])
            total += gptq_work(linear.rows, linear.columns, search).times(settings)
    return sum(_factors(spec), total)


def _quantize(spec: ModuleSpec, config: ModelConfig, recipe: Recipe, passes: Passes) -> Work:
    """The sums over tokens, factors, corrected targets and GPTQ of a module, and its quantized outputs."""
    tokens, search = passes.rows * passes.length, recipe.quantizer.search
    row = forward_work(spec, config, passes.length)
    total = row.times(passes.rows) + hessian_work(spec, tokens)
    if recipe.propagates:
        total += _propagation(spec, config, passes)
    else:
        reference = passes.rows if recipe.carries_reference else min(CHECK_ROWS, passes.rows)
        total += row.times(passes.rows + reference)
    walks = (gptq_work(linear.rows, linear.columns, search) for linear in spec.linears)
    samples = min(SAMPLES, _output_rows(recipe, passes) * passes.length)
    fed = (feedback_work(linear, samples) for linear in spec.linears if samples and feeds_columns(linear))
    return sum((*_factors(spec), *walks, *fed), total)


def _tune(spec: ModuleSpec, config: ModelConfig, recipe: Recipe) -> Work:
    """The full-precision model's states, and every step: forward, forward again and back, gradients of the weights."""
    step = forward_work(spec, config, PIECE)
    return step.times(5 * recipe.tuned_steps)


def _propagation(spec: ModuleSpec, config: ModelConfig, passes: Passes) -> Work:
    """Error propagation: both streams to the last stage, cross products, solves (`quantize/propagate.py`)."""
    tokens = passes.rows * passes.length
    *before, last = spec.stages
    first = [linear for stage in before for group in stage for linear in group]
    fast = 2 * sum(linear_work(linear, tokens) for linear in first)
    fast += 2 * attention_work(spec, config, passes.length).fast * passes.rows
    sums = exact = 0.0
    for group in (group for stage in before for group in stage):
        rows = group[0].rows
        sums += 2 * tokens * rows**2
        exact += 2 * SOLVE * rows**3 + sum(2 * rows * linear.weights for linear in group)
    for (linear,) in last:
        sums += 2 * linear_work(linear, tokens)
        exact += 2 * (1 + SOLVE) * linear.rows * linear.weights
    return Work(fast=fast, sums=sums, exact=exact)


def _factors(spec: ModuleSpec) -> Iterator[Work]:
    return (factor_work(group[0].rows) for group in spec.groups)


def _head_gradient(head: LinearSpec, tokens: int) -> Work:
    """The logits of all tokens, and their gradient at the final states."""
    return Work(fast=2 * linear_work(head, tokens))


def _head(head: LinearSpec, recipe: Recipe, passes: Passes) -> Work:
    """The head quantized, and the logits of the final check twice."""
    tokens, check = passes.rows * passes.length, min(CHECK_ROWS, passes.rows) * passes.length
    sums = (3 if recipe.propagates else 1) * tokens * head.rows**2
    walk = gptq_work(head.rows, head.columns, recipe.quantizer.search)
    return Work(fast=2 * linear_work(head, check), sums=sums) + factor_work(head.rows) + walk
