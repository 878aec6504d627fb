"""The linears of an EXL2 directory: widths, groups, scales, and error against the source."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exl2jax.errors import FormatError, SettingsError
from exl2jax.models import Exl2Model, HFModel, LinearSpec, head_spec, load_exl2, module_specs, open_model
from exl2jax.models.transform import transformed_for
from exl2jax.ops.packing import PackedLinear, read_groups, unpack_scales

LEAST, MEDIAN, MOST = 0, 50, 100


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearInspection:
    """One linear: `[rows, columns]`, rows by width in bits, groups by their rows, bits per weight, and scales.

    `scale_max` and `scale` are least, median and greatest of `q_scale_max` and of the step sizes
    `q_scale_max (s / 16)^2` that follow from it. `subnormal` is the share of steps below half precision's normal range.
    `error` is `||W - Q||_F / ||W||_F` against the source and `max_error` its largest entry, None without a source.
    """

    key: str
    rows: int
    columns: int
    widths: Mapping[int, int]
    groups: Mapping[int, int]
    bpw: float
    scale_max: tuple[float, float, float]
    scale: tuple[float, float, float]
    subnormal: float
    error: float | None = None
    max_error: float | None = None


def inspect(directory: Path, tensor: str | None = None, source: Path | None = None) -> list[LinearInspection]:
    """Inspect every linear of an EXL2 directory, or those whose key holds `tensor`; `source` is the original model."""
    model = load_exl2(directory)
    original = None if source is None else open_model(source)
    if original is not None and not isinstance(original, HFModel):
        raise SettingsError(f"{source}: `against` must be the original model, this is an EXL2 directory too")
    original = None if original is None else transformed_for(model, original)
    linears = [x for spec in module_specs(model.config) for x in spec.linears] + [head_spec(model.config)]
    name = (tensor or "").removesuffix(".weight").removesuffix(".q_weight")
    chosen = [linear for linear in linears if name in linear.key]
    if not chosen:
        raise SettingsError(f"{directory}: no linear's name holds {tensor!r}; the first is {linears[0].key}")
    return [_inspect(model, linear, original) for linear in chosen]


def _inspect(model: Exl2Model, linear: LinearSpec, original: HFModel | None) -> LinearInspection:
    packed = model.packed(linear)
    try:
        groups = read_groups(packed)
    except FormatError as e:
        raise FormatError(f"{model.directory}: {linear.key}: {e}") from e
    widths, sizes = {}, {}
    for group in groups:
        widths[group.bits] = widths.get(group.bits, 0) + group.rows
        sizes[group.rows] = sizes.get(group.rows, 0) + 1
    steps = _steps(packed)[:, : linear.columns]
    error, largest = (None, None) if original is None else _errors(model, linear, original)
    return LinearInspection(
        key=linear.key,
        rows=linear.rows,
        columns=linear.columns,
        widths=widths,
        groups=sizes,
        bpw=packed.bits / linear.weights,
        scale_max=_spread(packed.q_scale_max),
        scale=_spread(steps),
        subnormal=float(np.mean(steps < np.finfo(np.float16).tiny)),
        error=error,
        max_error=largest,
    )


def _steps(packed: PackedLinear) -> np.ndarray:
    """Step sizes `[groups, columns]` float64 before their rounding to half precision."""
    index = np.asarray(unpack_scales(packed.q_scale), np.float64)
    return np.square(index / 16) * packed.q_scale_max.astype(np.float64)[:, None]


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    least, median, most = np.percentile(values.astype(np.float64), (LEAST, MEDIAN, MOST))
    return float(least), float(median), float(most)


def _errors(model: Exl2Model, linear: LinearSpec, original: HFModel) -> tuple[float, float]:
    wanted = original.kernel(linear).astype(np.float64)
    difference = model.kernel(linear).astype(np.float64) - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted)), float(np.abs(difference).max())
