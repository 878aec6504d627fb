"""Tuning a quantized module: norms, maxima of scales and biases as they will be stored, and the errors they leave.

The weight that is judged and stored is rounded to half and dequantized exactly.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Module, ModuleSpec
from exl2jax.ops import QuantizedLinear, dequantized_weight, group_table
from exl2jax.quantize.changes import (
    Changes,
    groups_of_rows,
    moved,
    no_changes,
    stored_biases,
    stored_maxima,
    stored_norms,
)
from exl2jax.stream.chunks import rows_at_once
from exl2jax.variants import Choice
from exl2jax.variants.tuning import Tunable, Tuned


class TunedBlock(NamedTuple):
    """A module as it will be stored: its parameters, its linears, and how the tuning went."""

    params: dict[str, Any]
    linears: dict[str, QuantizedLinear]
    result: Tuned


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneTask:
    """A module to tune: its quantized form, the states `[R, T, D]` it reads, and those it should give."""

    module: Module
    spec: ModuleSpec
    params: Mapping[str, Any]
    linears: Mapping[str, QuantizedLinear]
    states: np.ndarray
    reference: np.ndarray
    mask: np.ndarray

    def run(self, choice: Choice, seed: int) -> TunedBlock:
        """Tune by the variant `choice`; the module comes back as it is where that gains nothing, or has one row."""
        kept = TunedBlock(dict(self.params), dict(self.linears), Tuned(None, 0.0, 0.0, 0))
        if len(self.states) < 2:
            return kept
        size = rows_at_once(*self.states.shape)
        shuffled = np.random.default_rng([seed, self.spec.index]).permutation(len(self.states))
        start = no_changes(self.spec.linears, self.spec.norms, self.params)
        gradient, error = partial(self._gradient, self._rows_of_groups()), partial(self._error, size)
        result = choice.function(Tunable(start, shuffled, size, gradient, error), choice.settings)
        if result.values is None:
            return kept._replace(result=result)
        return TunedBlock(*self.stored(result.values), result)

    def stored(self, values: Changes) -> tuple[dict[str, Any], dict[str, QuantizedLinear]]:
        """Parameters and linears with the changes, in half precision."""
        params, linears = dict(self.params), dict(self.linears)
        for name, delta in values.maxima.items():
            linears[name] = _with_maxima(linears[name], np.asarray(delta))
            params[name] = {**params[name], "kernel": linears[name].weight}
        params |= stored_norms(self.params, self.spec.norms, values)
        for name, bias in stored_biases(self.params, values).items():
            params[name] = {**params[name], "bias": bias}
        return params, linears

    def _rows_of_groups(self) -> dict[str, np.ndarray]:
        """The group of each row of a linear, rows as in the model."""
        out = {}
        for name, linear in self.linears.items():
            out[name] = np.empty(len(linear.perm), np.int32)
            out[name][np.asarray(linear.perm)] = groups_of_rows(linear.groups)
        return out

    def _gradient(self, of_row: Mapping[str, np.ndarray], values: Changes, rows: np.ndarray) -> Changes:
        arrays = (self.states[rows], self.reference[rows], self.mask[rows])
        return _gradient(values, self.params, of_row, *arrays, module=self.module)

    def _error(self, size: int, values: Changes, rows: np.ndarray) -> float:
        params, _ = self.stored(values)
        mask, total, count = self.mask, 0.0, 0.0
        for part, real in _padded(rows, size):
            weight = mask[part] * real[:, None]
            sums = _errors(self.module, params, self.states[part], self.reference[part], weight)
            total, count = total + float(sums), count + float(weight.sum())
        return total / max(count, 1.0)


def _padded(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows in batches of one size, and which of them count."""
    for start in range(0, len(rows), size):
        real = np.arange(start, start + size) < len(rows)
        yield rows[np.minimum(np.arange(start, start + size), len(rows) - 1)], real.astype(np.float32)


def _with_maxima(linear: QuantizedLinear, delta: np.ndarray) -> QuantizedLinear:
    """The linear with its maxima changed and rounded to half, and the weight that this dequantizes to."""
    maxima = jnp.asarray(stored_maxima(np.asarray(linear.qscale_max), delta))
    table = group_table(linear.groups, len(linear.perm))
    weight = dequantized_weight(linear.codes, linear.qs, maxima, jnp.argsort(linear.perm), table)
    return linear._replace(qscale_max=maxima, weight=weight)


def _sum_of_errors(module: Module, params: Any, h: jax.Array, ref: jax.Array, mask: jax.Array) -> Any:
    """Sum over tokens of `|out - ref|^2 / |ref|^2`: every token's own measure, lest the loudest rule."""
    energy = jnp.sum(jnp.square(ref), axis=-1)
    error = jnp.sum(jnp.square(module.forward(params, h).hidden - ref), axis=-1)
    return jnp.sum(error * mask / (energy + 1e-6 * jnp.mean(energy) + 1e-30))


_errors = jax.jit(_sum_of_errors, static_argnames="module")


@partial(jax.jit, static_argnames="module")
def _gradient(
    values: Changes,
    params: Any,
    of_row: Mapping[str, jax.Array],
    h: jax.Array,
    ref: jax.Array,
    mask: jax.Array,
    *,
    module: Module,
) -> Changes:
    def loss(values: Changes) -> jax.Array:
        return _sum_of_errors(module, moved(params, of_row, values), h, ref, mask) / jnp.maximum(jnp.sum(mask), 1)

    return jax.grad(loss)(values)
