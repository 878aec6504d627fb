"""Dequantization: an EXL2 directory as a plain Hugging Face directory in float16, which any tool loads.

`transformers` loads it wherever it has the architecture. It has none of its own for Yi, MiniCPM, Index, InternLM2,
Orion and Gemmoe: those load with the Python files that came with the source, where there were any, as they are copied.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.errors import NumericalError, SettingsError
from exl2jax.exl2.copying import WEIGHT_SUFFIXES, copy_files, plan_copies
from exl2jax.models import Exl2Model, head_spec, load_exl2, module_specs, to_source
from exl2jax.models.config import CONFIG_NAME
from exl2jax.models.modules import embedding_shapes
from exl2jax.models.spelling import TEXT_SECTION
from exl2jax.ops.packing import TENSOR_NAMES
from exl2jax.storage import make_directory, write_json, write_tensors
from exl2jax.storage.source_files import INDEX_NAME

SHARD_BYTES = 4 << 30


def dequantize_model(directory: Path, out: Path) -> int:
    """Write the model of an EXL2 directory to `out` with the source's tensor names, float16; returns its bytes.

    Tensors are fused and transposed as in the source. Where sources of an architecture spell names differently, names
    have the spelling that its `renames` start from. Linears are exactly what the runtime reconstructs. A
    head that was tied to the embedding becomes a tensor of its own, as it was quantized and the embedding was not.
    Raises `SettingsError` when `out` holds weights already, `NumericalError` when a tensor does not fit half precision,
    `ModelError` when tensors are missing.
    """
    model = load_exl2(directory)
    make_directory(out, "the output directory")
    held = sorted(p.name for p in out.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if held or out.resolve() == directory.resolve():
        raise SettingsError(f"{out}: holds weights already ({', '.join(held[:3])}); choose an empty directory")
    copy_files(plan_copies(directory), out)
    written = _write_shards(_tensors(model), out)
    write_json(out / CONFIG_NAME, _plain_config(model.raw_config))
    return written


def _plain_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of a plain model; its sections lose the dtypes of the source as well."""
    sections = {k: _without_dtype(v) if k.endswith("_config") and isinstance(v, dict) else v for k, v in raw.items()}
    plain = {**_without_dtype(sections), "tie_word_embeddings": False, "dtype": "float16"}
    plain.pop("quantization_config", None)
    if isinstance(text := plain.get(TEXT_SECTION), dict):
        plain[TEXT_SECTION] = {**text, "tie_word_embeddings": False}
    # The rows of the head had length one before they were quantized.
    return plain | {"norm_head": 0} if "norm_head" in plain else plain


def _without_dtype(section: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in section.items() if k not in ("torch_dtype", "dtype")}


def _tensors(model: Exl2Model) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in the source's names and layout, the embedding first."""
    head = head_spec(model.config)
    linears = {x.key: x for spec in module_specs(model.config) for x in spec.linears} | {head.key: head}
    weights = {f"{key}.weight": linear for key, linear in linears.items()}
    biases = {f"{key}.bias": linear for key, linear in linears.items()}

    def read(name: str) -> np.ndarray:
        if name in weights:
            return model.kernel(weights[name]).T
        tensor = model.files.read(name)
        # The biases of linears are padded as their columns are.
        return _half(tensor[: biases[name].columns] if name in biases else tensor, name)

    stored = [name for name in model.files if name.rpartition(".")[2] not in TENSOR_NAMES]
    first = embedding_shapes(model.config)
    return to_source([*sorted(stored, key=lambda n: (n not in first, n)), *weights], read, model.config)


def _half(tensor: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = tensor.astype(np.float16)
    if not np.isfinite(half).all():
        raise NumericalError(f"{name}: holds values beyond half precision, so no float16 directory can hold the model")
    return half


def _write_shards(tensors: Iterator[tuple[str, np.ndarray]], out: Path) -> int:
    """Write `model.safetensors`, or numbered shards and their index where one file would outgrow `SHARD_BYTES`."""
    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        shards.append(list(waiting))
        write_tensors(out / f"model-{len(shards):05}.safetensors", waiting, {"format": "pt"})
        waiting.clear()

    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        waiting[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (out / "model-00001.safetensors").rename(out / "model.safetensors")
    else:
        where = {name: f"model-{i + 1:05}.safetensors" for i, names in enumerate(shards) for name in names}
        write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": where})
    return total
