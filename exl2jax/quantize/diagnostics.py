"""Diagnostics: numerical faults that a conversion survives, in words, for the summary and the report of a module."""

from collections.abc import Iterable, Sequence

import numpy as np

from exl2jax.models import LinearSpec, ModuleSpec
from exl2jax.models.modules import MOE_KIND
from exl2jax.ops.rounding import HALF_MAX
from exl2jax.quantize.linear import Checks

NEAR = 0.5
"""Share of the range of half precision from which on a conversion warns."""

STARVED = 0.1
"""An expert that gets less than this part of an even share of the tokens is reported."""


def hessian_diagnostics(checks: Checks, linears: Sequence[LinearSpec]) -> list[str]:
    """Lines on the Hessian that `linears` share: raised damping, inputs never active."""
    keys, out = " and ".join(linear.key for linear in linears), []
    if checks.attempts > 1:
        out.append(f"{keys}: damping raised {checks.attempts - 1} times, to {checks.damping:.3g}")
    if checks.dead:
        out.append(f"{keys}: {checks.dead} of {linears[0].rows} inputs are never active on this calibration data")
    return out


def linear_diagnostics(spec: LinearSpec, checks: Checks) -> list[str]:
    """A line on weights too small for half precision, which the format stores as zero: groups whose scale vanished."""
    if not checks.lost:
        return []
    return [f"{spec.key}: the weights of {checks.lost} groups vanish in half precision and are stored as zero"]


def overflow_warnings(peaks: Iterable[tuple[str, float, float]], *, wide_residual: bool = False) -> list[str]:
    """A line where states or outputs of linears come near the end of half precision, with the first module's name.

    `peaks` are the key of each module in order, its largest state and its largest output of a linear. States count
    unless ExLlamaV2 keeps those of the architecture in float32 (`wide_residual`).
    """
    counted = [(key, output if wide_residual else max(state, output)) for key, state, output in peaks]
    near = [(key, value) for key, value in counted if value >= NEAR * HALF_MAX]
    if not near:
        return []
    (key, first), largest = near[0], max(value for _, value in near)
    more = f", up to {largest:.4g} in {len(near)} modules" if len(near) > 1 else ""
    what = "outputs of linears" if wide_residual else "states or outputs of linears"
    kept = "them" if wide_residual else "both"
    return [
        f"{key}: {what} reach {first:.4g} of the {HALF_MAX:g} that half precision holds{more}; "
        f"ExLlamaV2 keeps {kept} in half precision, and aborts its own conversion where 0.5 % of a row overflow"
    ]


def clamp_bias(spec: LinearSpec, bias: np.ndarray | None) -> tuple[np.ndarray | None, list[str]]:
    """The bias `[N]` within the range of half precision, as it is stored, and a line if that changed it."""
    if bias is None:
        return None, []
    beyond = int(np.sum(np.abs(bias) > HALF_MAX))
    notes = [f"{spec.key}: {beyond} biases beyond half precision, clamped to {HALF_MAX:g}"] if beyond else []
    return np.clip(bias, -HALF_MAX, HALF_MAX), notes


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
