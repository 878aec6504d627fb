"""One linear from weight to packed tensors, with the checks that stand between computing and trusting it."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.errors import FormatError, HessianError, NumericalError
from exl2jax.models import LinearSpec, ModuleSpec
from exl2jax.ops import HessianFactor, PackedLinear, QuantizedLinear, pack_linear, unpack_linear
from exl2jax.ops.rounding import HALF_MAX
from exl2jax.pallas import kernels_for
from exl2jax.qparams import QParams, require_quantizable_rows
from exl2jax.stream.devices import local_devices
from exl2jax.variants import STOCK, Method


class PackedWeight(NamedTuple):
    """The stored tensors of a linear and the weight `[K, N]` float16 they dequantize to."""

    packed: PackedLinear
    weight: jax.Array


def factor_hessian(hessian: jax.Array, name: str, method: Method = STOCK) -> HessianFactor:
    """Factor a Hessian, or raise `HessianError` naming the linear."""
    factor = method.factorize(hessian)
    if not bool(factor.ok):
        if not bool(jnp.all(jnp.isfinite(hessian))):
            raise HessianError(
                f"{name}: the Hessian holds NaN or infinity; the activations overflow on this calibration data"
            )
        raise HessianError(
            f"{name}: the Hessian is not positive definite after {int(factor.attempts)} dampings "
            f"(last {float(factor.damping):.3g}); use more or other calibration rows"
        )
    return factor


def require_half_range(kernel: np.ndarray | jax.Array, spec: LinearSpec) -> None:
    """Raise `NumericalError` where a weight is NaN or beyond what the format can hold."""
    largest = float(jnp.max(jnp.abs(kernel)))
    if not largest <= HALF_MAX:
        raise NumericalError(
            f"{spec.key}: a weight of magnitude {largest:.4g}, EXL2 holds {HALF_MAX:g} at most; "
            "the source model is damaged or cannot be converted"
        )


def quantize_linear(
    kernel: np.ndarray | jax.Array, factor: HessianFactor, qparams: QParams, spec: LinearSpec, method: Method = STOCK
) -> QuantizedLinear:
    """Quantize a linear's weight `[K, N]`; raises `NumericalError` when the result is not finite."""
    require_quantizable_rows(spec.rows, spec.key)
    require_half_range(kernel, spec)
    linear = method.quantize(jnp.asarray(kernel, jnp.float32), factor, qparams.groups(spec.rows), kernels_for())
    if not bool(jnp.all(jnp.isfinite(linear.weight))):
        raise NumericalError(
            f"{spec.key}: quantization gave NaN or infinity; the weights come too close to the end of half precision, "
            "or the calibration data is degenerate: try other rows"
        )
    return linear


class Task(NamedTuple):
    """A linear to quantize: arguments of `quantize_linear`."""

    kernel: np.ndarray | jax.Array
    factor: HessianFactor
    qparams: QParams
    spec: LinearSpec
    method: Method = STOCK


def quantize_many(tasks: Sequence[Task]) -> list[QuantizedLinear]:
    """Quantize independent linears side by side, results in order."""
    return in_threads(lambda task: quantize_linear(*task), tasks)


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
    packed = pack_linear(linear, bias, kernels_for().pack_codes)
    again = unpack_linear(packed)[:, : spec.columns]
    if not np.array_equal(again.view(np.uint16), np.asarray(linear.weight).view(np.uint16)):
        raise FormatError(
            f"{spec.key}: the packed tensors do not dequantize to the quantized weight; please report this"
        )
    return PackedWeight(packed, linear.weight)


def module_factors(spec: ModuleSpec, hessians: Sequence[jax.Array], method: Method = STOCK) -> dict[str, HessianFactor]:
    """Factored Hessians by linear name; linears of a group share one."""
    factors = {}
    for group, hessian in zip(spec.groups, hessians, strict=True):
        factor = factor_hessian(hessian, " and ".join(linear.key for linear in group), method)
        factors |= {linear.name: factor for linear in group}
    return factors
