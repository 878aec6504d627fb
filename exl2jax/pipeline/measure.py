"""The measurement pass: what every candidate of every module does to that module's output."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from exl2jax.errors import NumericalError
from exl2jax.models import Decoder, ModuleSpec
from exl2jax.ops import HessianFactor, relative_frobenius
from exl2jax.pipeline.linear import Task, factor_hessian, quantize_many
from exl2jax.pipeline.measurement import MIN_ACCURACY, Candidate, candidate_rows, module_bits
from exl2jax.pipeline.scan import Carry
from exl2jax.pipeline.stream import collect, forward
from exl2jax.pipeline.trials import Stack, candidate_errors
from exl2jax.qparams import QParams
from exl2jax.variants import STOCK, Method
from exl2jax.variants.candidates import STOCK_TABLE, Table

STATES = "row"
"""Name of the hidden states in a carry."""


class Block(NamedTuple):
    """A module and its parameters."""

    spec: ModuleSpec
    params: Mapping[str, Any]


def measure_step(
    carry: Carry,
    block: Block,
    *,
    decoder: Decoder,
    mask: np.ndarray | None,
    routed_only: bool = True,
    method: Method = STOCK,
    table: Table = STOCK_TABLE,
    of_rows: Callable[[jax.Array, jax.Array], jax.Array] = relative_frobenius,
) -> tuple[Carry, dict[str, tuple[Candidate, ...]]]:
    """Measure one module and move on with its unquantized outputs: the candidates of each of its slots by key.

    Settings that several candidates share are quantized once. Accuracy is `1 -` the mean over rows of the error
    `of_rows`, stock's `||out - ref|| / ||ref||`, with the residual included, but for the branches of a parallel block.
    """
    spec, states = block.spec, carry[STATES]
    params = jax.device_put(block.params)
    collected = collect(decoder, spec, params, states, mask, routed_only=routed_only)
    if not np.isfinite(collected.states).all():
        raise NumericalError(f"{spec.key}: the full-precision output holds NaN or infinity on this calibration data")
    factors = module_factors(spec, collected.hessians, method)
    found = {}
    for slot in spec.slots:
        rows = candidate_rows(slot, table)
        stacks = _quantize_candidates(slot, rows, params, factors, method)
        reference = collected.states if slot is spec else forward(decoder, slot.kind, params, states)
        errors = candidate_errors(decoder, slot, params, stacks, states, reference, mask, of_rows)
        found[slot.key] = tuple(
            Candidate(qparams=row, total_bits=module_bits(slot, row), accuracy=max(MIN_ACCURACY, float(1 - error)))
            for row, error in zip(rows, errors, strict=True)
        )
    return {STATES: collected.states}, found


def module_factors(spec: ModuleSpec, hessians: Sequence[jax.Array], method: Method = STOCK) -> dict[str, HessianFactor]:
    """Factored Hessians by linear name; linears of a group share one."""
    factors = {}
    for group, hessian in zip(spec.groups, hessians, strict=True):
        factor = factor_hessian(hessian, " and ".join(linear.key for linear in group), method)
        factors |= {linear.name: factor for linear in group}
    return factors


def _quantize_candidates(
    spec: ModuleSpec,
    rows: Sequence[Mapping[str, QParams]],
    params: Any,
    factors: Mapping[str, HessianFactor],
    method: Method,
) -> dict[str, Stack]:
    """Quantize every distinct setting of every linear once."""
    distinct = {linear.name: list(dict.fromkeys(row[linear.name] for row in rows)) for linear in spec.linears}
    tasks = [
        Task(params[linear.name]["kernel"], factors[linear.name], qparams, linear, method)
        for linear in spec.linears
        for qparams in distinct[linear.name]
    ]
    results = iter(quantize_many(tasks))
    return {
        name: Stack([next(results).weight for _ in settings], [settings.index(row[name]) for row in rows])
        for name, settings in distinct.items()
    }
