"""Rotary position embeddings and their scalings, as published configs spell them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from exl2jax.errors import ModelError, UnsupportedModelError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary settings: `theta` the base, `kind` the scaling type, `options` its published parameters.

    `scale` divides positions and `alpha` stretches the base (stock's `-rs` and `-ra`), on top of the model's own.
    """

    theta: float = 10000.0
    kind: str = "default"
    options: tuple[tuple[str, float], ...] = ()
    max_position: int = 2048
    original_max_position: int = 2048
    scale: float = 1.0
    alpha: float = 1.0

    def option(self, name: str, default: float | None = None) -> float | None:
        """A published parameter of the scaling, or `default`."""
        return dict(self.options).get(name, default)

    def factor(self) -> float:
        """The scaling's `factor`, 1 where it has none."""
        return self.option("factor") or 1.0


def read_rope(record: dict[str, Any], max_position: int, where: str) -> RopeConfig:
    """Rotary settings of a config, spelled the old way (`rope_theta`, `rope_scaling`) or the new (`rope_parameters`).

    Raises `UnsupportedModelError` for an unknown type, `ModelError` for a missing or non-numeric parameter.
    """
    given = record.get("rope_parameters") or record.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ModelError(f"{where}: rope_scaling must be an object, got {given!r:.80}")
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind not in KINDS:
        raise UnsupportedModelError(f"{where}: rope_scaling type {kind!r:.60} is not supported ({', '.join(KINDS)})")
    options = {k: float(v) for k, v in given.items() if isinstance(v, int | float)}
    missing = [k for k in _REQUIRED[kind] if not options.get(k, 0) > 0]
    if missing:
        raise ModelError(f"{where}: rope_scaling of type {kind} needs a positive {missing[0]}")
    theta = record.get("rope_theta", options.get("rope_theta", 10000.0))
    if not isinstance(theta, int | float) or not theta > 1:
        raise ModelError(f"{where}: rope_theta must be a number above 1, got {theta!r:.40}")
    original = int(options.get("original_max_position_embeddings", max_position))
    return RopeConfig(
        theta=float(theta),
        kind=kind,
        options=tuple(sorted(options.items())),
        max_position=max_position,
        original_max_position=original,
    )


def rope_tables(config: RopeConfig, head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine tables `[length, head_dim / 2]` float32, the attention factor of the scaling included."""
    base = config.theta * config.alpha ** (head_dim / (head_dim - 2)) if head_dim > 2 else config.theta
    if config.kind == "dynamic":
        seen = max(length, config.max_position)
        growth = config.factor() * seen / config.max_position - (config.factor() - 1)
        base *= growth ** (head_dim / (head_dim - 2))
    frequencies = base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    amplitude = 1.0
    if config.kind == "linear":
        frequencies = frequencies / config.factor()
    elif config.kind == "llama3":
        frequencies = _llama3(config, frequencies)
    elif config.kind == "yarn":
        frequencies, amplitude = _yarn(config, frequencies, base, head_dim)
    # transformers keeps frequencies and angles in float32, so models were trained on those roundings.
    positions = np.arange(length, dtype=np.float32) / np.float32(config.scale)
    angles = positions[:, None] * frequencies.astype(np.float32)[None, :]
    return np.cos(angles) * np.float32(amplitude), np.sin(angles) * np.float32(amplitude)


def _llama3(config: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Slow frequencies divided by the factor, fast ones kept, a linear blend between (Llama 3.1)."""
    low, high = config.option("low_freq_factor") or 1.0, config.option("high_freq_factor") or 4.0
    turns = config.original_max_position * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1) if high != low else (turns >= low).astype(np.float64)
    return frequencies * (blend + (1 - blend) / config.factor())


def _yarn(config: RopeConfig, frequencies: np.ndarray, base: float, dim: int) -> tuple[np.ndarray, float]:
    """NTK-by-parts of YaRN (arXiv:2309.00071): frequencies and the factor on cosine and sine."""

    def corner(rotations: float) -> float:
        return dim * math.log(config.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = corner(config.option("beta_fast") or 32.0)
    high = corner(config.option("beta_slow") or 1.0)
    if config.option("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return frequencies * (1 - ramp) + frequencies / config.factor() * ramp, _yarn_amplitude(config)


def _yarn_amplitude(config: RopeConfig) -> float:
    given = config.option("attention_factor")
    if given:
        return given

    def stretch(mscale: float) -> float:
        return 0.1 * mscale * math.log(config.factor()) + 1 if config.factor() > 1 else 1.0

    mscale, over_all = config.option("mscale"), config.option("mscale_all_dim")
    return stretch(mscale) / stretch(over_all) if mscale and over_all else stretch(1.0)
