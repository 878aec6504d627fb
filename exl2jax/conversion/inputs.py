"""The inputs that decide the bytes of a conversion, and their differences between two jobs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exl2jax.calibration import Tokenizer
from exl2jax.calibration.records import EXAMPLES, STANDARD
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.declaration import Decides, Setting, settings_of
from exl2jax.models import HFModel
from exl2jax.storage.digests import digest
from exl2jax.storage.hub_cache import cached_source
from exl2jax.version import VERSION

SHOWN = 40
"""Characters of a value in a message."""


def job_inputs(config: ConversionConfig, model: HFModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """The inputs as JSON, by name: what the job's files hold, and every setting that decides bytes."""
    inputs: dict[str, Any] = {
        "package version": VERSION,
        "model config": model.config_digest,
        "model weights": model.weights_digest(),
        "tokenizer": tokenizer.fingerprint,
        "preset": config.recipe.name,
        "variants": config.recipe.words(),
        "cal_dataset": _source(config.cal_dataset),
        "products": config.precision,
    }
    if (source := cached_source(config.in_dir)) is not None:
        inputs["source"] = source
    if config.measurement is not None:
        inputs["measurement"] = f"SHA-256 {digest(config.measurement)}"
    for setting in compared_settings(config):
        inputs[setting.name] = setting.encode(getattr(config, setting.name))
    return json.loads(json.dumps(inputs))  # as a job file gives them back: tuples are lists


def compared_settings(config: ConversionConfig) -> Iterator[Setting]:
    """The settings whose values decide bytes of this job; a measurement alone depends on fewer."""
    deciding = {Decides.MEASUREMENT}
    if config.output_measurement is None:
        deciding.add(Decides.QUANTIZATION)
    for setting in settings_of(type(config)):
        if setting.declared.decides in deciding and not setting.declared.by_content:
            yield setting


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A line for each input of an earlier job that differs now, with both values; settings stand in backticks."""
    lines = []
    for name in [*here, *(name for name in there if name not in here)]:
        before, now = there.get(name), here.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            if there.get("preset") == here.get("preset"):  # another preset changes every choice
                keys = sorted(key for key in {**before, **now} if before.get(key) != now.get(key))
                lines += [
                    f"{_named(name)} {key}={_shown(before.get(key))} there, {_shown(now.get(key))} now" for key in keys
                ]
            continue
        lines.append(f"{_named(name)} {_shown(before)} there, {_shown(now)} now")
    return lines


def _source(source: Any) -> str:
    if source is None:
        return STANDARD
    return str(source) if isinstance(source, str | Path) else EXAMPLES


def _named(name: str) -> str:
    settings = {setting.name for setting in settings_of(ConversionConfig)}
    return f"`{name}`" if name in settings else name


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "not given"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
