"""The measurement pass: what every candidate of every module does to that module's output."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from exl2jax.errors import NumericalError
from exl2jax.models import Decoder, ModuleSpec
from exl2jax.ops import HessianFactor, relative_frobenius
from exl2jax.pipeline.linear import Task, factor_hessian, quantize_many
from exl2jax.pipeline.measurement import MIN_ACCURACY, Candidate, candidate_rows, module_bits
from exl2jax.pipeline.scan import Carry
from exl2jax.pipeline.stream import collect, row_chunks
from exl2jax.qparams import QParams

STATES = "row"
"""Name of the hidden states in a carry."""


class Block(NamedTuple):
    """A module and its parameters."""

    spec: ModuleSpec
    params: Mapping[str, Any]


class _Stack(NamedTuple):
    """Distinct settings of one linear: their dequantized weights `[C, K, N]` float16, and the one of each candidate."""

    weights: jax.Array
    picks: np.ndarray


def measure_step(
    carry: Carry, block: Block, *, decoder: Decoder, mask: np.ndarray | None
) -> tuple[Carry, tuple[Candidate, ...]]:
    """Measure one module and move on with its unquantized outputs.

    Settings that several candidates share are quantized once, and the outputs of the first stage computed once per
    distinct setting. Accuracy is `1 - mean over rows of ||out - ref|| / ||ref||` with the residual included.
    """
    spec, states = block.spec, carry[STATES]
    params = jax.device_put(block.params)
    collected = collect(decoder, spec.kind, params, states, mask)
    if not np.isfinite(collected.states).all():
        raise NumericalError(f"{spec.key}: the full-precision output holds NaN or infinity on this calibration data")
    rows = candidate_rows(spec)
    factors = module_factors(spec, collected.first, collected.second)
    stacks = _quantize_candidates(spec, rows, params, factors)
    errors = _candidate_errors(decoder, spec, params, stacks, states, collected.states, mask)
    candidates = tuple(
        Candidate(qparams=row, total_bits=module_bits(spec, row), accuracy=max(MIN_ACCURACY, float(1 - error)))
        for row, error in zip(rows, errors, strict=True)
    )
    return {STATES: collected.states}, candidates


def module_factors(spec: ModuleSpec, first: jax.Array, second: jax.Array) -> dict[str, HessianFactor]:
    """Factored Hessians by linear name; linears of the first stage share one."""
    shared = factor_hessian(first, " and ".join(linear.key for linear in spec.first))
    return {linear.name: shared for linear in spec.first} | {spec.second.name: factor_hessian(second, spec.second.key)}


def _quantize_candidates(
    spec: ModuleSpec, rows: Sequence[Mapping[str, QParams]], params: Any, factors: Mapping[str, HessianFactor]
) -> dict[str, _Stack]:
    """Quantize every distinct setting of every linear once."""
    distinct = {linear.name: list(dict.fromkeys(row[linear.name] for row in rows)) for linear in spec.linears}
    tasks = [
        Task(params[linear.name]["kernel"], factors[linear.name], qparams, linear)
        for linear in spec.linears
        for qparams in distinct[linear.name]
    ]
    results = iter(quantize_many(tasks))
    return {
        name: _Stack(
            jnp.stack([next(results).weight for _ in settings]),
            np.asarray([settings.index(row[name]) for row in rows], np.int32),
        )
        for name, settings in distinct.items()
    }


def _candidate_errors(
    decoder: Decoder,
    spec: ModuleSpec,
    params: Any,
    stacks: Mapping[str, _Stack],
    states: np.ndarray,
    reference: np.ndarray,
    mask: np.ndarray | None,
) -> np.ndarray:
    """Mean relative error of each candidate over the rows, `[candidates]` float64."""
    weights = {name: stack.weights for name, stack in stacks.items()}
    index = {name: jnp.asarray(stack.picks) for name, stack in stacks.items()}
    mask = np.ones(states.shape[:2], np.float32) if mask is None else mask.astype(np.float32)
    parts = []
    for chunk in row_chunks(states):
        arrays = (chunk.take(states), chunk.take(reference), chunk.take(mask))
        errors = _chunk_errors(
            params, weights, index, *arrays, decoder=decoder, kind=spec.kind, second=spec.second.name
        )
        parts.append(np.asarray(errors)[:, : chunk.stop - chunk.start])
    return np.concatenate(parts, axis=1).astype(np.float64).mean(axis=1)


@partial(jax.jit, static_argnames=("kind", "second", "decoder"))
def _chunk_errors(
    params: Any,
    weights: dict[str, jax.Array],
    index: dict[str, jax.Array],
    h: jax.Array,
    reference: jax.Array,
    mask: jax.Array,
    *,
    decoder: Decoder,
    kind: str,
    second: str,
) -> jax.Array:
    """Relative error of every candidate on every row, `[candidates, rows]`."""
    x = decoder.first_input(kind, params, h)
    outputs = {
        name: lax.map(partial(_linear, x, params[name]), stack) for name, stack in weights.items() if name != second
    }

    def candidate(pick: dict[str, jax.Array]) -> jax.Array:
        between = decoder.second_input(kind, params, {name: out[pick[name]] for name, out in outputs.items()})
        y = _linear(between, params[second], weights[second][pick[second]])
        out = decoder.residual(kind, params, h, y)
        return relative_frobenius(out * mask[:, :, None], reference * mask[:, :, None])

    return lax.map(candidate, index)


def _linear(x: jax.Array, params: Any, weight: jax.Array) -> jax.Array:
    y = x @ weight.astype(jnp.float32)
    return y + params["bias"] if "bias" in params else y
