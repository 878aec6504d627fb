"""The `quantization_config` of an EXL2 directory, checked against the contents of the files."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

from exl2jax.exl2.verify.report import Fault
from exl2jax.models import ModuleSpec
from exl2jax.models.config import CONFIG_NAME
from exl2jax.stock_tables import HEAD

SECTION = "quantization_config"

BITS_TOLERANCE = 0.05
"""Bits per weight that the count may differ from `bits` beyond what the allocation leaves unspent."""

MAX_BITS = 16.0
"""Bits per weight of the unquantized model, more than which no conversion makes."""

WIDEST_STEP = 2.0
"""Bits per weight between neighbouring candidates at their widest, from all at 6 bits to all at 8."""


def quantization_faults(raw: dict[str, Any]) -> list[Fault]:
    """Faults of the section itself: missing or ill-typed entries (docs/format.md 1.9)."""
    section = raw.get(SECTION)
    if not isinstance(section, dict):
        return [_fault("", "is missing; without it no loader takes the directory for a quantized model")]
    return list(_entry_faults(section))


def stated_bits(raw: dict[str, Any]) -> float | None:
    """`bits` as a usable number, or None."""
    section = raw.get(SECTION)
    bits = section.get("bits") if isinstance(section, dict) else None
    return float(bits) if _is_bits(bits) else None


def stated_head_bits(raw: dict[str, Any]) -> int | None:
    """`head_bits` as one of the known choices, or None."""
    section = raw.get(SECTION)
    bits = section.get("head_bits") if isinstance(section, dict) else None
    return bits if _is_count(bits) and bits in HEAD else None


def bits_faults(stated: float, counted: float, specs: Sequence[ModuleSpec]) -> list[Fault]:
    """A fault where the counted bits per weight differ from those of the config.

    An allocation stays within its budget and stops where the next option of every module would not fit, so it may
    fall short by one step of the largest module: little in a real model, much in one of two layers.
    """
    unspent = WIDEST_STEP * max(spec.weights for spec in specs) / sum(spec.weights for spec in specs)
    if stated - BITS_TOLERANCE - unspent <= counted <= stated + BITS_TOLERANCE:
        return []
    return [_fault(".bits", f"says {stated:g}, the files hold {counted:.4f} bits per weight")]


def _entry_faults(section: dict[str, Any]) -> Iterator[Fault]:
    if section.get("quant_method") != "exl2":
        yield _fault(".quant_method", f"must be 'exl2', got {section.get('quant_method')!r:.40}")
    if not _is_text(section.get("version")):
        yield _fault(".version", f"must be a version string, got {section.get('version')!r:.40}")
    if not _is_bits(section.get("bits")):
        yield _fault(".bits", f"must be a number above 0 and at most {MAX_BITS:g}, got {section.get('bits')!r:.40}")
    head_bits = section.get("head_bits")
    if not (_is_count(head_bits) and head_bits in HEAD):
        yield _fault(".head_bits", f"must be one of {', '.join(map(str, HEAD))}, got {head_bits!r:.40}")
    calibration = section.get("calibration")
    if not isinstance(calibration, dict):
        yield _fault(".calibration", f"must be an object, got {calibration!r:.40}")
        return
    for key in ("rows", "length"):
        if not _is_count(calibration.get(key)):
            yield _fault(f".calibration.{key}", f"must be a positive integer, got {calibration.get(key)!r:.40}")
    if not _is_text(calibration.get("dataset")):
        yield _fault(".calibration.dataset", f"must name the data set, got {calibration.get('dataset')!r:.40}")


def _fault(entry: str, message: str) -> Fault:
    return Fault(tensor=CONFIG_NAME, message=f"{SECTION}{entry} {message}")


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_bits(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_BITS


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
