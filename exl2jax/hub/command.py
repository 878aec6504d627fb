"""The command that makes the same bytes again, without a path of this machine."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.declaration import Decides, Setting, settings_of
from exl2jax.storage.hub_cache import cached_source


def command_of(config: ConversionConfig) -> str:
    """`exl2jax convert` with every flag that decides bytes and is not at its default; paths by their last name."""
    out = config.compile_full.name if config.compile_full else "EXL2"
    source = cached_source(config.in_dir) or config.in_dir.absolute().name
    words = ["exl2jax", "convert", "-i", source, "-o", "WORK", "-cf", out, "-b", f"{config.bits:g}"]
    for setting in settings_of(ConversionConfig):
        value = getattr(config, setting.name)
        if setting.name not in _SAID and setting.declared.decides != Decides.RUN and value != setting.default:
            words += [word for item in _items(setting, value) for word in item]
    return shlex.join(words)


_SAID = {"in_dir", "compile_full", "bits"}


def _items(setting: Setting, value: Any) -> Iterator[list[str]]:
    """The flag with its value, once for each value of a repeatable one."""
    flag = f"-{setting.declared.short}" if setting.declared.short else f"--{setting.long}"
    for item in value if setting.many else [value]:
        if isinstance(item, bool):
            yield [flag if item else f"--no-{setting.long}"]
        else:
            yield [flag, _shown(item)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str | int):
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)
    return value.name if isinstance(value, Path) else str(getattr(value, "name", "DATA"))
