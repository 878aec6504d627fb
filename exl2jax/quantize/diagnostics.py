"""Diagnostics: numerical faults that a conversion survives, in words, for the summary and the report of a module."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import LinearSpec, ModuleSpec
from exl2jax.models.modules import MOE_KIND
from exl2jax.ops import HessianFactor, QuantizedLinear
from exl2jax.ops.rounding import HALF_MAX

STARVED = 0.1
"""An expert that gets less than this part of an even share of the tokens is reported."""


def hessian_diagnostics(hessian: jax.Array, factor: HessianFactor, linears: Sequence[LinearSpec]) -> list[str]:
    """What was special about the Hessian `[K, K]` that `linears` share: raised damping, inputs never active."""
    keys, out = " and ".join(linear.key for linear in linears), []
    if int(factor.attempts) > 1:
        out.append(f"{keys}: damping raised {int(factor.attempts) - 1} times, to {float(factor.damping):.3g}")
    dead = int(jnp.sum(jnp.diagonal(hessian) == 0))
    if dead:
        out.append(f"{keys}: {dead} of {hessian.shape[0]} inputs are never active on this calibration data")
    return out


def linear_diagnostics(spec: LinearSpec, kernel: np.ndarray | jax.Array, linear: QuantizedLinear) -> list[str]:
    """Weights `[K, N]` too small for half precision, which the format stores as zero: groups whose scale vanished."""
    empty = np.flatnonzero(np.asarray(linear.qscale_max) == 0)
    perm, kernel = np.asarray(linear.perm), np.asarray(kernel)
    lost = sum(
        bool(kernel[perm[group.start : group.start + group.rows]].any())
        for group in (linear.groups[i] for i in empty.tolist())
    )
    return [f"{spec.key}: the weights of {lost} groups vanish in half precision and are stored as zero"] if lost else []


def clamp_bias(spec: LinearSpec, bias: np.ndarray | None) -> tuple[np.ndarray | None, list[str]]:
    """The bias `[N]` within the range of half precision, in which the format stores it, and what that changed."""
    if bias is None:
        return None, []
    beyond = int(np.sum(np.abs(bias) > HALF_MAX))
    said = [f"{spec.key}: {beyond} biases beyond half precision, clamped to {HALF_MAX:g}"] if beyond else []
    return np.clip(bias, -HALF_MAX, HALF_MAX), said


def calibration_shortage(linears: Sequence[LinearSpec], tokens: int) -> list[str]:
    """One line when a pass has fewer tokens than some linears have inputs: their Hessians cannot have full rank."""
    short = [linear for linear in linears if linear.rows > tokens]
    if not short:
        return []
    widest = max(short, key=lambda linear: linear.rows)
    return [
        f"under-calibrated: {tokens} tokens for {len(short)} of {len(linears)} linears with more inputs "
        f"(up to {widest.rows}, {widest.key}); damping fills the missing rank, more rows would serve better"
    ]


def starved_experts(spec: ModuleSpec, tokens: Sequence[int]) -> list[str]:
    """A line for each expert that got fewer than a tenth of an even share of the tokens, by tokens of each group."""
    if spec.kind != MOE_KIND:
        return []
    routed = tokens[-len(spec.stages[-1]) :]
    share = sum(routed) / len(routed)
    return [
        f"{spec.key}: expert {expert} saw {count} calibration tokens, under a tenth of an even share of {share:.0f}; "
        "use more calibration rows, or `moe_calibration` all"
        for expert, count in enumerate(routed)
        if count < STARVED * share
    ]
