"""Compilation: packed linears and untouched tensors into the shards of an EXL2 directory."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.errors import JobError, StorageError
from exl2jax.exl2.copying import copy_files, plan_copies
from exl2jax.models import HFModel, embedding_shapes, head_norm_spec, head_spec, module_specs
from exl2jax.models.config import CONFIG_NAME
from exl2jax.models.modules import LinearSpec
from exl2jax.ops.packing import stored_shapes
from exl2jax.qparams import QParams
from exl2jax.quantize.store import tensor_file
from exl2jax.storage import (
    ShardWriter,
    TensorHead,
    is_shard,
    make_directory,
    read_checked_tensors,
    shards_size,
    write_bytes,
    write_json,
)

TOKENIZER_NAME = "tokenizer.json"

log = logging.getLogger(__name__)


def compile_model(
    model: HFModel,
    out_tensor: Path,
    target: Path,
    *,
    shard_mb: float,
    own_norms: Collection[str] = (),
    changed: Mapping[str, np.ndarray] | None = None,
    own_files: Collection[Path] = (),
) -> tuple[Path, ...]:
    """Write the shards of the quantized model into `target`: everything its loader looks up, and nothing else.

    Norms come from the source, those whose keys are among `own_norms` from `out_tensor`; a tensor that is among those
    `changed` afterwards, by name, from there.
    Raises `StorageError` when `target` holds weight files that are neither shards nor among `own_files`: a loader would
    read them too.
    """
    make_directory(target, "the output directory")
    require_no_strays(target, own_files)
    writer = ShardWriter(target, shard_mb)
    changed = changed or {}
    for name, tensor in _tensors(model, out_tensor, own_norms):
        writer.add(name, changed.get(name, tensor))
    return writer.finish()


def compiled_size(model: HFModel, qparams: Mapping[str, QParams], *, shard_mb: float) -> int:
    """Bytes of the shards that `compile_model` writes when every linear, the head too, is quantized by its `qparams`.

    `qparams` go by the linears' keys. Norms count as the source stores them.
    """
    return shards_size(_heads(model, qparams), shard_mb)


def source_head(model: HFModel, name: str) -> TensorHead:
    """The header entry of a tensor that is copied as the source stores it."""
    return TensorHead(name, model.files.dtype(name), model.files.shape(name))


def _heads(model: HFModel, qparams: Mapping[str, QParams]) -> Iterator[TensorHead]:
    """The header entry of every tensor, in the order of `_tensors`."""

    def plain(names: Iterable[str]) -> Iterator[TensorHead]:
        return (source_head(model, name) for name in names)

    def packed(linear: LinearSpec) -> Iterator[TensorHead]:
        groups = qparams[linear.key].groups(linear.rows)
        shapes = stored_shapes(groups, linear.rows, linear.columns, bias=linear.bias)
        return (TensorHead(f"{linear.key}.{name}", *stored) for name, stored in sorted(shapes.items()))

    yield from plain(embedding_shapes(model.config))
    for spec in module_specs(model.config):
        yield from plain(spec.plain)
        for linear in spec.linears:
            yield from packed(linear)
    yield from plain(head_norm_spec(model.config).tensors)
    yield from packed(head_spec(model.config))
    yield from plain(model.copied())


def largest_tensor(model: HFModel, qparams: Mapping[str, QParams]) -> TensorHead:
    """The largest tensor of the result when every linear is quantized by its `qparams`, which a shard must hold."""
    return max(_heads(model, qparams), key=lambda tensor: tensor.nbytes)


def copy_source_files(
    model: HFModel, target: Path, quantization: Mapping[str, Any], *, tokenizer: str | None = None
) -> None:
    """Copy what a loader or a person reads of the source, and write its config with `quantization_config` added.

    `tokenizer` is the content of a `tokenizer.json` for a source that has none.
    """
    copies = plan_copies(model.directory)
    copy_files(copies, target)
    if tokenizer is not None:
        write_bytes(target / TOKENIZER_NAME, tokenizer.encode())
    write_json(target / CONFIG_NAME, {**model.stock_config(), "quantization_config": dict(quantization)})
    if copies.left:
        log.info("not copied, as no loader of the result reads it: %s", ", ".join(copies.left))


def require_no_strays(target: Path, known: Collection[Path] = ()) -> None:
    """Refuse a directory with weight files that are neither shards nor `known`: a loader would read them too."""
    strays = sorted(p.name for p in target.glob("*.safetensors") if not is_shard(p.name) and p not in known)
    if strays:
        raise StorageError(f"{target / strays[0]}: not of this conversion, but its loader would read it; move it away")


def _tensors(model: HFModel, out_tensor: Path, own_norms: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the output in module order, a linear's by name: where a shard ends depends on the order."""
    yield from _plain(model, embedding_shapes(model.config))
    for spec in module_specs(model.config):
        for norm in spec.norms:
            yield from _packed(out_tensor, norm.key) if norm.key in own_norms else _plain(model, norm.tensors)
        for linear in spec.linears:
            yield from _packed(out_tensor, linear.key)
    yield from _plain(model, head_norm_spec(model.config).tensors)
    yield from _packed(out_tensor, head_spec(model.config).key)
    yield from _plain(model, model.copied())


def _plain(model: HFModel, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors that stay as they are."""
    for name in names:
        yield name, model.files.read(name)


def _packed(out_tensor: Path, key: str) -> Iterator[tuple[str, np.ndarray]]:
    path = tensor_file(out_tensor, key)
    if not path.exists():
        raise JobError(f"{path}: the quantized tensors of {key} are missing; start over with `no_resume`")
    try:
        tensors, _ = read_checked_tensors(path)
    except StorageError as e:
        raise JobError(f"{e}; start over with `no_resume`") from e
    yield from sorted(tensors.items())
