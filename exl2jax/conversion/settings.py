"""What was asked of a job, as its file keeps it: the work directory alone is enough to resume."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from exl2jax.calibration import CalibrationConfig
from exl2jax.conversion.config import ConversionConfig
from exl2jax.errors import JobError
from exl2jax.variants.recipe import recipe_of_record

PATHS = ("in_dir", "compile_full", "output_measurement", "measurement")
LISTS = ("pins", "exclude_bits")
PER_RUN = ("out_dir", "no_resume", "devices", "device_memory")
"""Settings that are paths, those that are tuples, and those that say nothing of the job itself."""


def asked_record(config: ConversionConfig) -> dict[str, Any]:
    """The settings in JSON, paths in full.

    Calibration data that was given from Python is left out; a resume without it is refused, for other data.
    """
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in PER_RUN}
    values |= {name: str(values[name].resolve()) for name in PATHS if values[name] is not None}
    preset = config.preset if isinstance(config.preset, str) else asdict(config.preset)
    return {**values, "cal_dataset": _source_record(config.cal_dataset), "preset": preset}


def resumed_config(out_dir: Path, record: Mapping[str, Any], given: Mapping[str, Any]) -> ConversionConfig:
    """The settings that the job in `out_dir` keeps, those `given` now in their place.

    Raises `JobError` where they are not the settings of a job, `SettingsError` where one of them is out of range.
    """
    try:
        kept = _settings(record)
        return ConversionConfig(**{**kept, **given, "out_dir": out_dir})
    except (AttributeError, KeyError, TypeError) as e:
        raise JobError(f"{out_dir}: the job file does not hold the settings of a job ({e}); start over with -nr") from e


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {**record, **{name: Path(record[name]) for name in PATHS if record[name] is not None}}
    if isinstance(source := kept["cal_dataset"], dict):
        cal_dir = None if source["cal_dir"] is None else Path(source["cal_dir"])
        kept["cal_dataset"] = CalibrationConfig(**{**source, "columns": tuple(source["columns"]), "cal_dir": cal_dir})
    if isinstance(kept["preset"], dict):
        kept["preset"] = recipe_of_record(kept["preset"])
    return kept | {name: tuple(kept.get(name, ())) for name in LISTS}


def _source_record(source: Any) -> Any:
    if isinstance(source, CalibrationConfig):
        known = isinstance(source.source, str | Path)
        return {n: str(v) if isinstance(v, Path) else v for n, v in asdict(source).items()} if known else None
    return str(source) if isinstance(source, str | Path) else None
