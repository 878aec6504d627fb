"""Changes of what the format leaves free in a quantized module: maxima of scales, norms and biases.

The codes stay. A group's maximum scales its rows of the weight, so while it is tuned the weight is the dequantized one
times a factor per row.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from exl2jax.models import LinearSpec
from exl2jax.models.modules import NormSpec
from exl2jax.ops.rounding import HALF_MAX
from exl2jax.qparams import ROW_MULTIPLE, Group

UNTUNED = "router"
"""The router is stored with the norms but is not tuned."""

LEAST_BIAS = 1e-2
"""Unit of a bias that is zero throughout, so that it can move at all."""


class Changes(NamedTuple):
    """Relative changes, zero at first: of each linear's maxima `[K / 32]` (as many as groups count), of each norm's
    weight and bias, of each linear's bias, in units of its root mean square.
    """  # noqa: D205

    maxima: dict[str, Any]
    norms: dict[str, dict[str, Any]]
    biases: dict[str, Any]


def no_changes(linears: tuple[LinearSpec, ...], norms: tuple[NormSpec, ...], params: Mapping[str, Any]) -> Changes:
    """The start of a tuning of some linears and norms, whose parameters are `params`."""
    tuned = [norm.name for norm in norms if norm.name != UNTUNED]
    return Changes(
        {x.name: np.zeros(x.rows // ROW_MULTIPLE, np.float32) for x in linears},
        {n: {part: np.zeros(np.shape(v), np.float32) for part, v in params[n].items()} for n in tuned},
        {x.name: np.zeros(x.columns, np.float32) for x in linears if x.bias},
    )


def moved(params: Mapping[str, Any], of_row: Mapping[str, Any], values: Changes) -> dict[str, Any]:
    """Parameters with the changes, unrounded; `of_row` is the group of each row of a linear, rows as in the model."""
    out = dict(params)
    for name, delta in values.maxima.items():
        kernel = params[name]["kernel"].astype(jnp.float32)
        out[name] = {**out[name], "kernel": kernel * (1 + delta[of_row[name]])[:, None]}
    for name, delta in values.norms.items():
        out[name] = moved_norm(params[name], delta)
    for name, delta in values.biases.items():
        out[name] = {**out[name], "bias": moved_bias(params[name]["bias"], delta)}
    return out


def stored_norms(
    params: Mapping[str, Any], norms: tuple[NormSpec, ...], values: Changes
) -> dict[str, dict[str, np.ndarray]]:
    """The parameters of the changed norms, as they come back from half precision."""
    offsets = {norm.name: np.float32(norm.offset) for norm in norms}
    out = {}
    for name, delta in values.norms.items():
        offset = {"weight": offsets[name]}
        parts = moved_norm(params[name], delta)
        out[name] = {part: half(value, offset.get(part, np.float32(0))) for part, value in parts.items()}
    return out


def stored_biases(params: Mapping[str, Any], values: Changes) -> dict[str, np.ndarray]:
    """The changed biases, as they come back from half precision."""
    moved_biases = {name: moved_bias(params[name]["bias"], delta) for name, delta in values.biases.items()}
    return {name: half(value, np.float32(0)) for name, value in moved_biases.items()}


def stored_maxima(maxima: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Maxima float16 with their relative changes."""
    changed = np.asarray(maxima, np.float32) * (1 + np.asarray(delta))
    return np.clip(changed, 0, HALF_MAX).astype(np.float16)


def groups_of_rows(groups: tuple[Group, ...]) -> np.ndarray:
    """The group of each packed row, int32."""
    return np.repeat(np.arange(len(groups), dtype=np.int32), [group.rows for group in groups])


def moved_norm(norm: Mapping[str, Any], delta: Mapping[str, Any]) -> dict[str, Any]:
    """A norm's parameters with their relative changes."""
    bias = {"bias": moved_bias(norm["bias"], delta["bias"])} if "bias" in norm else {}
    return {"weight": norm["weight"] * (1 + delta["weight"]), **bias}


def moved_bias(bias: Any, delta: Any) -> Any:
    """A bias with its change, in units of its root mean square."""
    size = jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(bias, jnp.float32))))
    return bias + delta * jnp.maximum(size, LEAST_BIAS)


def half(value: Any, offset: np.float32) -> np.ndarray:
    """The value as it comes back from half precision, in which it is stored less its offset."""
    kept = np.clip(np.asarray(value, np.float32) - offset, -HALF_MAX, HALF_MAX).astype(np.float16)
    return kept.astype(np.float32) + offset
