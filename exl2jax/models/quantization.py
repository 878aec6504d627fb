"""The quantization settings of a source's `config.json`, compared with its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2jax.errors import ModelError, SettingsError
from exl2jax.models.config import CONFIG_NAME, ModelConfig
from exl2jax.models.modules import module_specs
from exl2jax.models.tensors import FLOAT8, SourceTensors
from exl2jax.storage import TensorFiles

FLOAT_DTYPES = ("F16", "BF16", "F32")
KEYS = ("quantization_config", "compression_config")
"""Keys under which quantizers leave their settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """The quantization settings of a config: their `key`, the `method`, and all settings."""

    key: str
    method: str
    settings: Mapping[str, Any]


def stated_quantization(raw: Mapping[str, Any]) -> Quantization | None:
    """The quantization settings of a config; None without any. An empty object counts as none."""
    for key in KEYS:
        value = raw.get(key)
        if value in (None, {}):
            continue
        settings = value if isinstance(value, dict) else {}
        method = settings.get("quant_method", "no quant_method is named") if isinstance(value, dict) else value
        return Quantization(key=key, method=f"{method!s:.40}", settings=settings)
    return None


def without_quantization(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config without its quantization settings."""
    return {key: value for key, value in raw.items() if key not in KEYS}


def open_tensors(
    files: TensorFiles, config: ModelConfig, stated: Quantization | None, directory: Path
) -> tuple[SourceTensors, tuple[str, ...]]:
    """The tensors of a source, and a note where its quantization settings are left over from another model.

    Raises `SettingsError` where the weights are quantized in another way than FP8 with block scales.
    """
    if stated is None:
        return SourceTensors(files, config), ()
    where = directory / CONFIG_NAME
    if stated.method == "fp8" and any(files.dtype(name) == FLOAT8 for name in files):
        scaled = SourceTensors(files, config, _block(stated, where))
        scaled.check_scales()
        return scaled, ()
    tensors = SourceTensors(files, config)
    packed = _not_plain(tensors, config)
    if packed is not None:
        raise SettingsError(
            f"{where}: the model is already quantized ({stated.method}); take the original. {stated.key} says so, and "
            f"{packed} is no float tensor of the full shape"
        )
    note = f"{CONFIG_NAME}: {stated.key} ({stated.method}) is ignored: every linear is stored in full, as floats"
    return tensors, (note,)


def _not_plain(tensors: SourceTensors, config: ModelConfig) -> str | None:
    """The first linear that is not stored in full as floats, None where all are."""
    for spec in module_specs(config):
        for linear in spec.linears:
            name = f"{linear.key}.weight"
            try:
                plain = name in tensors and tensors.shape(name) == (linear.columns, linear.rows)
                plain = plain and tensors.dtype(name) in FLOAT_DTYPES
            except ModelError:
                plain = False
            if not plain:
                return name
    return None


def _block(stated: Quantization, where: Path) -> tuple[int, int]:
    """Block size of FP8 weights; other FP8 layouts are refused."""
    match stated.settings.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case other:
            raise SettingsError(
                f"{where}: FP8 weights need a weight_block_size of two numbers in {stated.key}, got {other!r:.40}; "
                "take the original in 16 bits"
            )
