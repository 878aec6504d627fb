"""Rotary position embeddings and their scalings, as published configs spell them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exl2jax.errors import ModelError, UnsupportedModelError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "mrope")
"""Types of scaling. `mrope` equals `default` on text, where the three positions of a token are the same."""

SYNONYMS = {"su": "longrope"}

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": (),
    "mrope": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary settings: `theta` the base, `kind` the scaling type, `options` its published parameters.

    `partial` is the share of a head that turns, `long` and `short` the divisors of LongRoPE, one for each frequency.
    `scale` divides positions and `alpha` stretches the base (stock's settings), on top of the model's own.
    """

    theta: float = 10000.0
    kind: str = "default"
    options: tuple[tuple[str, float], ...] = ()
    long: tuple[float, ...] = ()
    short: tuple[float, ...] = ()
    partial: float = 1.0
    max_position: int = 2048
    original_max_position: int = 2048
    scale: float = 1.0
    alpha: float = 1.0

    def option(self, name: str, default: float | None = None) -> float | None:
        """A published parameter of the scaling, or `default`."""
        return dict(self.options).get(name, default)

    def rotary_dim(self, head_dim: int) -> int:
        """How many dimensions of a head turn."""
        return int(head_dim * self.partial)

    def factor(self) -> float:
        """The scaling's `factor`, 1 where it has none."""
        return self.option("factor") or 1.0


def read_rope(record: Mapping[str, Any], max_position: int, where: str, *, head_dim: int | None = None) -> RopeConfig:
    """Rotary settings of a config in the old spelling, `rope_theta` and `rope_scaling` (see `spelling`).

    Raises `UnsupportedModelError` for an unknown type, `ModelError` for a missing or non-numeric parameter.
    """
    given = record.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ModelError(f"{where}: rope_scaling must be an object, got {given!r:.80}")
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = SYNONYMS.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in KINDS:
        raise UnsupportedModelError(f"{where}: rope_scaling type {kind!r:.60} is not supported ({', '.join(KINDS)})")
    options = {k: float(v) for k, v in given.items() if isinstance(v, int | float)}
    partial = _partial(record, head_dim, where)
    long, short = (_divisors(given, key, kind, head_dim, partial, where) for key in ("long_factor", "short_factor"))
    missing = [k for k in _REQUIRED[kind] if not options.get(k, 0) > 0]
    if missing:
        raise ModelError(f"{where}: rope_scaling of type {kind} needs a positive {missing[0]}")
    original = options.get("original_max_position_embeddings", record.get("original_max_position_embeddings"))
    if kind == "longrope" and not isinstance(original, int | float):
        raise ModelError(f"{where}: rope_scaling of type {kind} needs original_max_position_embeddings")
    original = int(original) if isinstance(original, int | float) else max_position
    return RopeConfig(
        theta=read_theta(record, "rope_theta", where),
        long=long,
        short=short,
        partial=partial,
        kind=kind,
        options=tuple(sorted(options.items())),
        max_position=max_position,
        original_max_position=original,
    )


def read_theta(record: Mapping[str, Any], key: str, where: str) -> float:
    """The base of the rotary frequencies."""
    theta = record.get(key, 10000.0)
    theta = 10000.0 if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < float("inf"):
        raise ModelError(f"{where}: {key} must be a number above 1, got {theta!r:.40}")
    return float(theta)


def _partial(record: Mapping[str, Any], head_dim: int | None, where: str) -> float:
    partial = record.get("partial_rotary_factor")
    partial = 1.0 if partial is None else partial
    if isinstance(partial, bool) or not isinstance(partial, int | float) or not 0 < partial <= 1:
        raise ModelError(f"{where}: partial_rotary_factor must lie between 0 and 1, got {partial!r:.40}")
    if head_dim is not None and (int(head_dim * partial) < 2 or int(head_dim * partial) % 2):
        raise ModelError(f"{where}: partial_rotary_factor {partial} of {head_dim} dimensions makes no whole pairs")
    return float(partial)


def _divisors(
    given: Mapping[str, Any], key: str, kind: Any, head_dim: int | None, partial: float, where: str
) -> tuple[float, ...]:
    """LongRoPE's divisors of the frequencies."""
    values = given.get(key)
    if kind != "longrope":
        return ()
    if not isinstance(values, list) or not all(isinstance(v, int | float) and v > 0 for v in values):
        raise ModelError(f"{where}: rope_scaling of type longrope needs a list of positive numbers as {key}")
    if head_dim is not None and len(values) != int(head_dim * partial) // 2:
        pairs = int(head_dim * partial) // 2
        raise ModelError(f"{where}: {key} holds {len(values)} numbers, the heads have {pairs} pairs of dimensions")
    return tuple(float(v) for v in values)


def rope_tables(config: RopeConfig, dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine tables `[length, dim / 2]` float32, the attention factor of the scaling included.

    `dim` is the number of dimensions that turn, `config.rotary_dim` of a head's.
    """
    base = config.theta * config.alpha ** (dim / (dim - 2)) if dim > 2 else config.theta
    if config.kind == "dynamic":
        seen = max(length, config.max_position)
        growth = config.factor() * seen / config.max_position - (config.factor() - 1)
        base *= growth ** (dim / (dim - 2))
    frequencies = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    amplitude = 1.0
    if config.kind == "linear":
        frequencies = frequencies / config.factor()
    elif config.kind == "llama3":
        frequencies = _llama3(config, frequencies)
    elif config.kind == "yarn":
        frequencies, amplitude = _yarn(config, frequencies, base, dim)
    elif config.kind == "longrope":
        frequencies, amplitude = _longrope(config, frequencies, length)
    # transformers computes frequencies and angles in float32, so models were trained with those roundings.
    positions = np.arange(length, dtype=np.float32) / np.float32(config.scale)
    angles = positions[:, None] * frequencies.astype(np.float32)[None, :]
    return np.cos(angles) * np.float32(amplitude), np.sin(angles) * np.float32(amplitude)


def _llama3(config: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Slow frequencies divided by the factor, fast ones kept, a linear blend between (Llama 3.1)."""
    low, high = config.option("low_freq_factor") or 1.0, config.option("high_freq_factor") or 4.0
    turns = config.original_max_position * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1) if high != low else (turns >= low).astype(np.float64)
    return frequencies * (blend + (1 - blend) / config.factor())


def _longrope(config: RopeConfig, frequencies: np.ndarray, length: int) -> tuple[np.ndarray, float]:
    """LongRoPE (arXiv:2402.13753): one set of divisors up to the trained length, another beyond."""
    divisors = config.long if length > config.original_max_position else config.short
    growth = config.option("factor") or config.max_position / config.original_max_position
    amplitude = config.option("attention_factor")
    if amplitude is None:
        stretched = 1 + math.log(growth) / math.log(config.original_max_position) if growth > 1 else 1.0
        amplitude = math.sqrt(stretched)
    return frequencies / np.asarray(divisors), amplitude


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
