"""Tuning a quantized module: norms, maxima of scales and biases as they will be stored, and the errors they leave.

The codes stay. A group's maximum scales its rows of the weight, so while it is tuned the weight is the dequantized one
times a factor per row; the weight that is judged and stored is rounded to half and dequantized exactly.
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
from exl2jax.ops.rounding import HALF_MAX
from exl2jax.qparams import ROW_MULTIPLE
from exl2jax.stream.chunks import rows_at_once
from exl2jax.variants import Choice
from exl2jax.variants.tuning import Tunable, Tuned

UNTUNED = "router"
"""The router is stored with the norms but is not tuned."""

LEAST_BIAS = 1e-2
"""Unit of a bias that is zero throughout, so that it can move at all."""


class Changes(NamedTuple):
    """Relative changes, zero at first: of each linear's maxima `[K / 32]` (as many as groups count), of each norm's
    weight and bias, of each linear's bias, in units of its root mean square.
    """  # noqa: D205

    maxima: dict[str, jax.Array]
    norms: dict[str, dict[str, jax.Array]]
    biases: dict[str, jax.Array]


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
        gradient, error = partial(self._gradient, self._rows_of_groups()), partial(self._error, size)
        result = choice.function(Tunable(self._start(), shuffled, size, gradient, error), choice.settings)
        if result.values is None:
            return kept._replace(result=result)
        return TunedBlock(*self.stored(result.values), result)

    def stored(self, values: Changes) -> tuple[dict[str, Any], dict[str, QuantizedLinear]]:
        """Parameters and linears with the changes, in half precision."""
        params, linears = dict(self.params), dict(self.linears)
        offsets = {norm.name: np.float32(norm.offset) for norm in self.spec.norms}
        for name, delta in values.maxima.items():
            linears[name] = _with_maxima(linears[name], np.asarray(delta))
            params[name] = {**params[name], "kernel": linears[name].weight}
        for name, delta in values.norms.items():
            moved = _moved_norm(params[name], delta)
            offset = {"weight": offsets[name]}
            params[name] = {part: _half(v, offset.get(part, np.float32(0))) for part, v in moved.items()}
        for name, delta in values.biases.items():
            params[name] = {**params[name], "bias": _half(_moved_bias(params[name]["bias"], delta), np.float32(0))}
        return params, linears

    def _start(self) -> Changes:
        norms = [norm.name for norm in self.spec.norms if norm.name != UNTUNED]
        return Changes(
            {x.name: jnp.zeros(x.rows // ROW_MULTIPLE, jnp.float32) for x in self.spec.linears},
            {n: {part: jnp.zeros(np.shape(v), jnp.float32) for part, v in self.params[n].items()} for n in norms},
            {x.name: jnp.zeros(x.columns, jnp.float32) for x in self.spec.linears if x.bias},
        )

    def _rows_of_groups(self) -> dict[str, np.ndarray]:
        """The group of each row of a linear, rows as in the model."""
        out = {}
        for name, linear in self.linears.items():
            out[name] = np.empty(len(linear.perm), np.int32)
            out[name][np.asarray(linear.perm)] = _groups_of_rows(linear)
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


def _groups_of_rows(linear: QuantizedLinear) -> np.ndarray:
    return np.repeat(np.arange(len(linear.groups), dtype=np.int32), [group.rows for group in linear.groups])


def _with_maxima(linear: QuantizedLinear, delta: np.ndarray) -> QuantizedLinear:
    """The linear with its maxima changed and rounded to half, and the weight that this dequantizes to."""
    maxima = np.asarray(linear.qscale_max, np.float32) * (1 + delta)
    maxima = jnp.asarray(np.clip(maxima, 0, HALF_MAX).astype(np.float16))
    table = group_table(linear.groups, len(linear.perm))
    weight = dequantized_weight(linear.codes, linear.qs, maxima, jnp.argsort(linear.perm), table)
    return linear._replace(qscale_max=maxima, weight=weight)


def _moved_norm(norm: Mapping[str, Any], delta: Mapping[str, Any]) -> dict[str, Any]:
    bias = {"bias": _moved_bias(norm["bias"], delta["bias"])} if "bias" in norm else {}
    return {"weight": norm["weight"] * (1 + delta["weight"]), **bias}


def _moved_bias(bias: Any, delta: Any) -> Any:
    size = jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(bias, jnp.float32))))
    return bias + delta * jnp.maximum(size, LEAST_BIAS)


def _half(value: Any, offset: np.float32) -> np.ndarray:
    """The value as it comes back from half precision, in which it is stored less its offset."""
    kept = np.clip(np.asarray(value, np.float32) - offset, -HALF_MAX, HALF_MAX).astype(np.float16)
    return kept.astype(np.float32) + offset


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
        moved = dict(params)
        for name, delta in values.maxima.items():
            kernel = params[name]["kernel"].astype(jnp.float32)
            moved[name] = {**moved[name], "kernel": kernel * (1 + delta[of_row[name]])[:, None]}
        for name, delta in values.norms.items():
            moved[name] = _moved_norm(params[name], delta)
        for name, delta in values.biases.items():
            moved[name] = {**moved[name], "bias": _moved_bias(params[name]["bias"], delta)}
        return _sum_of_errors(module, moved, h, ref, mask) / jnp.maximum(jnp.sum(mask), 1)

    return jax.grad(loss)(values)
