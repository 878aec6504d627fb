"""The settings of a job as its file keeps them: the work directory alone is enough to resume."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.declaration import settings_of
from exl2jax.errors import JobError
from exl2jax.variants.recipe import Recipe, recipe_of_record


def settings_record(config: ConversionConfig) -> dict[str, Any]:
    """The settings in JSON, paths in full, without those of one run only.

    Calibration data given from Python is left out; a resume without it is refused, since its rows differ.
    """
    record: dict[str, Any] = {}
    for setting in settings_of(type(config)):
        value = getattr(config, setting.name)
        if setting.declared.recorded:
            record[setting.name] = asdict(value) if isinstance(value, Recipe) else setting.encode(value)
    return record


def resumed_config(
    out_dir: Path, record: Mapping[str, Any], given: Mapping[str, Any], kind: type[ConversionConfig] = ConversionConfig
) -> ConversionConfig:
    """The settings that the job in `out_dir` keeps, with those `given` now in their place.

    Raises `JobError` where the record is not that of a job, `SettingsError` where a setting is out of range.
    """
    try:
        settings = {s.name: s.decode(record[s.name]) for s in settings_of(kind) if s.declared.recorded}
        if isinstance(settings["preset"], Mapping):
            settings["preset"] = recipe_of_record(settings["preset"])
        return kind(**{**settings, **given, "out_dir": out_dir})
    except (AttributeError, KeyError, TypeError) as e:
        raise JobError(
            f"{out_dir}: the job file does not hold the settings of a job ({e}); start over with `no_resume`"
        ) from e
