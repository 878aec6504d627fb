"""The result of a conversion: a summary for the table, for JSON and for the job file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from exl2jax.conversion.shown import shown

POOR_PERPLEXITY = 30.0
FAILED_PERPLEXITY = 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionResult:
    """Summary of a finished run. Sizes in bytes, times in seconds, perplexities on the calibration rows.

    `tuned` is the record of a tuning of the whole model: steps, tokens, and the divergence on text kept apart before
    and after, or the reason why there was none. The perplexity is that before it.

    `output` is the compiled directory, or the measurement file of a run that only measures, where the rest is None.
    """

    output: str
    bits: float
    preset: str
    bpw: float | None = None
    head_bits: int | None = None
    size: int | None = None
    source_size: int | None = None
    perplexity: float | None = None
    perplexity_full: float | None = None
    rfn_error: Mapping[str, float] | None = None
    stream_error: Mapping[str, float] | None = None
    allocation: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] | None = None
    tuned: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return asdict(self)


def perplexity_warnings(perplexity: float, full: float = 0.0) -> tuple[str, ...]:
    """Warnings by the limits that stock documents for the final check: over 30 is poor, over 1000 has failed.

    `full` is the perplexity of the unquantized model: over 1000 it is no fault of the quantization.
    """
    if perplexity > FAILED_PERPLEXITY:
        figure = shown(perplexity, 1)
        if full > FAILED_PERPLEXITY:
            return (
                f"calibration perplexity {figure} is above 1000, and so is that of the source ({shown(full, 1)}): the "
                "source model is damaged, or the calibration text is none that it can predict",
            )
        return (f"calibration perplexity {figure} is above 1000: the quantization has FAILED, do not use it",)
    if perplexity > POOR_PERPLEXITY:
        return (
            f"calibration perplexity {shown(perplexity, 2)} is above 30: poor, check the source model and the bits",
        )
    return ()
