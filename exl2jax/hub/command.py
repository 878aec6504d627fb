"""The command that makes the same bytes again, without a path of this machine."""

import shlex
from pathlib import Path
from typing import Any

from exl2jax.calibration import CalibrationConfig
from exl2jax.calibration.records import EXAMPLES
from exl2jax.conversion.config import ConversionConfig
from exl2jax.storage.hub_cache import cached_source

FLAGS = {
    "head_bits": "-hb",
    "measurement": "-m",
    "dataset_rows": "-r",
    "measurement_rows": "-mr",
    "length": "-l",
    "measurement_length": "-ml",
    "shard_size": "-ss",
    "rope_scale": "-rs",
    "rope_alpha": "-ra",
    "seed": "--seed",
    "allocation": "--allocation",
    "moe_calibration": "--moe-calibration",
}
"""Settings that decide the bytes, by their flags; the calibration, the preset and limits come on top."""


def command_of(config: ConversionConfig) -> str:
    """`exl2jax convert` with every flag that is not at its default; directories by their last name."""
    plain = ConversionConfig(in_dir=Path("source"), out_dir=Path("work"))
    out = config.compile_full.name if config.compile_full else "EXL2"
    source = cached_source(config.in_dir) or config.in_dir.resolve().name
    words = ["exl2jax", "convert", "-i", source, "-o", "WORK", "-cf", out, "-b", f"{config.bits:g}"]
    for name, flag in FLAGS.items():
        if (value := getattr(config, name)) != getattr(plain, name):
            words += [flag, _shown(value)]
    words += _calibration(config.cal_dataset)
    words += ["--preset", config.preset if isinstance(config.preset, str) else config.preset.name]
    words += [word for pin in config.pins for word in ("--pin", pin)]
    words += [word for bits in config.exclude_bits for word in ("--exclude-bits", str(bits))]
    return shlex.join(words)


def _calibration(given: Any) -> list[str]:
    if given is None:
        return []
    if not isinstance(given, CalibrationConfig):
        return ["-c", _named(given)]
    words = ["-c", _named(given.source)]
    words += [word for column in given.columns for word in ("--cal-column", column)]
    words += ["--cal-split", given.split] if given.split != "train" else []
    return words


def _named(source: Any) -> str:
    if not isinstance(source, str | Path):
        return EXAMPLES
    return Path(source).name if Path(source).exists() else str(source)


def _shown(value: Any) -> str:
    if isinstance(value, Path):
        return value.name
    return f"{value:g}" if isinstance(value, float) else str(value)
