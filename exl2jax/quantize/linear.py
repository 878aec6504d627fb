"""One linear from weight to packed tensors, with the checks that stand between computing and trusting it.

Nothing here waits for the device but `read_checks` and `PackedArrays.stored`: what may fail comes back as data.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.errors import FormatError, HessianError, NumericalError
from exl2jax.models import LinearSpec, ModuleSpec
from exl2jax.ops import (
    HessianFactor,
    PackedArrays,
    PackedLinear,
    QuantizedLinear,
    WalkOptions,
    gptq_arrays,
    group_table,
    pack_arrays,
)
from exl2jax.ops.columns import ColumnFeedback
from exl2jax.ops.gptq import QuantizedArrays
from exl2jax.ops.groups import GroupTable
from exl2jax.ops.kernels import Kernels, PackTiles
from exl2jax.ops.rounding import HALF_MAX
from exl2jax.pallas import kernels_for
from exl2jax.qparams import ROW_MULTIPLE, Group, QParams, require_quantizable_rows
from exl2jax.stream.devices import local_devices
from exl2jax.stream.streams import read
from exl2jax.variants import STOCK, Quantizer


class Checks(NamedTuple):
    """The possible faults of a linear, read from the device.

    Of its Hessian: whether it was `factored`, after how many `attempts`, by which `damping`, whether it was
    `hessian_finite`, how many inputs are `dead`. Of the linear: its `largest` weight, whether the result is `finite`,
    how many groups of nonzero weights vanish in half precision (`lost`), and whether the packed tensors dequantize to
    the `same` weight.
    """

    factored: bool
    attempts: int
    damping: float
    hessian_finite: bool
    dead: int
    largest: float
    finite: bool
    lost: int
    same: bool


class Quantized(NamedTuple):
    """A quantized linear, packed and unpacked again, all on the device; `checks` is for `read_checks`."""

    linear: QuantizedLinear
    packed: PackedArrays
    checks: jax.Array


class Priced(NamedTuple):
    """Losses `[settings, K / 32]` of a linear on the device; `checks` is for `read_checks`."""

    losses: jax.Array
    checks: jax.Array


def quantize(
    kernel: np.ndarray | jax.Array,
    factor: HessianFactor,
    qparams: QParams,
    spec: LinearSpec,
    quantizer: Quantizer = STOCK,
    source: np.ndarray | jax.Array | None = None,
    columns: ColumnFeedback | None = None,
) -> Quantized:
    """Quantize and pack a linear's weight `[K, N]`; `source` is the model's own where another target is asked for.

    The walk feeds errors to later `columns`, if given.

    `SettingsError` where the format cannot hold its rows. All else that may be wrong is in the checks.
    """
    require_quantizable_rows(spec.rows, spec.key)
    groups, kernels = qparams.groups(spec.rows), kernels_for()
    table = group_table(groups, spec.rows)
    source = kernel if source is None else source
    if quantizer.walks:
        options = WalkOptions(quantizer.search, kernels)
        found, packed, checks = _quantized(kernel, source, factor, table, columns, options=options)
    else:
        linear = quantizer.quantize(jnp.asarray(kernel, jnp.float32), factor, groups)
        found = QuantizedArrays(linear.codes, linear.qs, linear.qscale_max, linear.weight)
        packed, checks = _checked(kernel, source, factor, found, table, pack=kernels.pack_tiles)
    linear = QuantizedLinear(found.codes, found.qs, found.qscale_max, factor.perm, groups, found.weight)
    return Quantized(linear, packed, checks)


def price(
    kernel: np.ndarray | jax.Array,
    factor: HessianFactor,
    settings: Sequence[QParams],
    column_weight: np.ndarray | jax.Array,
    spec: LinearSpec,
    quantizer: Quantizer = STOCK,
) -> Priced:
    """Price a linear's error under each of several settings, by tile of 32 permuted rows."""
    cuts = tuple(setting.groups(spec.rows) for setting in settings)
    run = _priced_at_once if quantizer.walks else _priced
    return run(kernel, factor, column_weight, cuts=cuts, quantizer=quantizer, kernels=kernels_for())


def repacked(linear: QuantizedLinear, factor: HessianFactor, kernel: np.ndarray | jax.Array) -> Quantized:
    """A linear whose scales were changed after it was quantized, packed anew; `kernel [K, N]` is the model's own."""
    found = QuantizedArrays(linear.codes, linear.qs, linear.qscale_max, linear.weight)
    table = group_table(linear.groups, len(linear.perm))
    packed, checks = _checked(kernel, kernel, factor, found, table, pack=kernels_for().pack_tiles)
    return Quantized(linear, packed, checks)


@partial(jax.jit, static_argnames="options")
def _quantized(
    kernel: jax.Array,
    source: jax.Array,
    factor: HessianFactor,
    table: jax.Array,
    columns: ColumnFeedback | None,
    *,
    options: WalkOptions,
) -> tuple[QuantizedArrays, PackedArrays, jax.Array]:
    """Everything of `quantize` that runs on the device, as one program for a shape of matrix."""
    found = gptq_arrays(kernel.astype(jnp.float32), factor, table, columns, options=options)
    return found, *_checked(kernel, source, factor, found, table, pack=options.kernels.pack_tiles)


@partial(jax.jit, static_argnames="pack")
def _checked(
    kernel: jax.Array,
    source: jax.Array,
    factor: HessianFactor,
    found: QuantizedArrays,
    table: jax.Array,
    *,
    pack: PackTiles,
) -> tuple[PackedArrays, jax.Array]:
    packed = pack_arrays(found.codes, found.qs, found.qscale_max, factor.perm, found.weight, table, pack=pack)
    finite = jnp.all(jnp.isfinite(found.weight))
    return packed, _record(kernel, factor, finite, _lost(source, factor, found, table), packed.same)


def _priced(
    kernel: np.ndarray | jax.Array,
    factor: HessianFactor,
    column_weight: np.ndarray | jax.Array,
    *,
    cuts: tuple[tuple[Group, ...], ...],
    quantizer: Quantizer,
    kernels: Kernels,
) -> Priced:
    losses = quantizer.tile_losses(kernel, factor, cuts, jnp.asarray(column_weight), kernels)
    return Priced(losses, _price_checks(kernel, factor, losses))


_priced_at_once = jax.jit(_priced, static_argnames=("cuts", "quantizer", "kernels"))
"""One program for a shape of matrix, where the rounding is a walk."""


@jax.jit
def _price_checks(kernel: jax.Array, factor: HessianFactor, losses: jax.Array) -> jax.Array:
    return _record(kernel, factor, jnp.all(jnp.isfinite(losses)), jnp.int32(0), jnp.bool_(True))


def _record(kernel: jax.Array, factor: HessianFactor, finite: jax.Array, lost: jax.Array, same: jax.Array) -> jax.Array:
    """`Checks` as one array, float32."""
    largest = jnp.max(jnp.abs(kernel)).astype(jnp.float32)
    of_hessian = (factor.ok, factor.attempts, factor.damping, factor.finite, factor.dead)
    return jnp.stack([x.astype(jnp.float32) for x in (*of_hessian, largest, finite, lost, same)])


def _lost(source: jax.Array, factor: HessianFactor, found: QuantizedArrays, table: jax.Array) -> jax.Array:
    """Groups whose weights are not zero and whose scale is."""
    tiles = jnp.any(source != 0, axis=1)[factor.perm].reshape(-1, ROW_MULTIPLE)
    groups = GroupTable.of(table)
    used = jnp.zeros(len(groups.rows), jnp.bool_).at[groups.tile_group].max(jnp.any(tiles, axis=1))
    return jnp.sum(used & (found.qscale_max == 0), dtype=jnp.int32)


def read_checks(checks: Sequence[jax.Array]) -> list[Checks]:
    """The checks of some linears, read from the device at once."""
    return [as_checks(row) for row in read(list(checks))]


def as_checks(row: np.ndarray | jax.Array) -> Checks:
    """The checks in an array of a result that has been read from the device."""
    values = zip(Checks.__annotations__.values(), np.asarray(row).tolist(), strict=True)
    return Checks(*(kind(value) for kind, value in values))


def require_factored(checks: Checks, name: str) -> None:
    """Raise `HessianError` where the Hessian of the linears `name` could not be factored."""
    if checks.factored:
        return
    if not checks.hessian_finite:
        raise HessianError(
            f"{name}: the Hessian holds NaN or infinity; the activations overflow on this calibration data"
        )
    raise HessianError(
        f"{name}: the Hessian is not positive definite after {checks.attempts} dampings "
        f"(last {checks.damping:.3g}); use more or other calibration rows"
    )


def require_in_range(checks: Checks, spec: LinearSpec) -> None:
    """Raise `NumericalError` where a weight is NaN or beyond what the format can hold."""
    if not checks.largest <= HALF_MAX:
        raise NumericalError(
            f"{spec.key}: a weight of magnitude {checks.largest:.4g}, EXL2 holds {HALF_MAX:g} at most; "
            "the source model is damaged or cannot be converted"
        )


def require_sound(checks: Checks, spec: LinearSpec, hessian: str) -> None:
    """Raise the error of the first check of a quantized linear that failed; `hessian` names the linears that share it.

    `HessianError`, `NumericalError`, or `FormatError` where packing does not keep the weight.
    """
    require_factored(checks, hessian)
    require_in_range(checks, spec)
    if not checks.finite:
        raise NumericalError(
            f"{spec.key}: quantization gave NaN or infinity; the weights come too close to the end of half precision, "
            "or the calibration data is degenerate: try other rows"
        )
    _require_same(checks, spec)


def _require_same(checks: Checks, spec: LinearSpec) -> None:
    """Raise `FormatError` where packing does not keep the weight."""
    if not checks.same:
        raise FormatError(
            f"{spec.key}: the packed tensors do not dequantize to the quantized weight; please report this"
        )


def require_priced(checks: Checks, spec: LinearSpec, hessian: str) -> None:
    """Raise the error of the first check of a priced linear that failed."""
    require_factored(checks, hessian)
    require_in_range(checks, spec)
    if not checks.finite:
        raise NumericalError(
            f"{spec.key}: its costs hold NaN or infinity; the activations of this calibration data overflow"
        )


class PackedWeight(NamedTuple):
    """The stored tensors of a linear and the weight `[K, N]` float16 they dequantize to."""

    packed: PackedLinear
    weight: jax.Array


def factor_hessian(hessian: jax.Array, name: str, quantizer: Quantizer = STOCK) -> HessianFactor:
    """Factor a Hessian and wait for it, or raise `HessianError` naming the linear."""
    factor = quantizer.factorize(hessian)
    require_factored(read_checks([_factor_checks(factor)])[0], name)
    return factor


@jax.jit
def _factor_checks(factor: HessianFactor) -> jax.Array:
    return _record(jnp.zeros((1,)), factor, jnp.bool_(True), jnp.int32(0), jnp.bool_(True))


def in_threads[T, R](work: Callable[[T], R], tasks: Sequence[T]) -> list[R]:
    """Run independent pieces of work side by side, a thread per core, dealt out among the devices; results in order.

    GPTQ's walk over rows is a chain of small steps that one core runs as fast as many, so the cores take a linear each.
    Neither the work's arrays nor its results may be bound to a device.
    """

    def run(task: T, device: Any) -> R:
        with jax.default_device(device):
            return work(task)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(run, tasks, cycle(local_devices())))


def pack_checked(linear: QuantizedLinear, spec: LinearSpec, bias: np.ndarray | None) -> PackedWeight:
    """Pack a linear and prove that unpacking it gives back, bit for bit, the weight the pipeline goes on with."""
    done = repacked(linear, HessianFactor.identity(linear.perm), linear.weight)
    _require_same(read_checks([done.checks])[0], spec)
    return PackedWeight(done.packed.stored(linear.groups, bias), linear.weight)


def module_factors(
    spec: ModuleSpec, hessians: Sequence[jax.Array], quantizer: Quantizer = STOCK
) -> dict[str, HessianFactor]:
    """Factored Hessians by linear name; linears of a group share one."""
    factors = {}
    for group, hessian in zip(spec.groups, hessians, strict=True):
        factor = factor_hessian(hessian, " and ".join(linear.key for linear in group), quantizer)
        factors |= {linear.name: factor for linear in group}
    return factors
