"""Loading a model one module at a time, from a Hugging Face directory or from an EXL2 one."""

import hashlib
import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from exl2jax.errors import FormatError, ModelError, SettingsError
from exl2jax.models.config import CONFIG_NAME, ModelConfig, read_config
from exl2jax.models.hints import dtype_hint, missing_hint, shape_hint, stored_layers
from exl2jax.models.modules import (
    LinearSpec,
    ModuleSpec,
    NormSpec,
    Shapes,
    embedding_name,
    embedding_shapes,
    head_norm_spec,
    head_spec,
    module_specs,
)
from exl2jax.models.quantization import FLOAT_DTYPES, open_tensors, stated_quantization, without_quantization
from exl2jax.models.registry import UNUSED
from exl2jax.models.spelling import TEXT_SECTION, stock_spelling
from exl2jax.models.stored_head import settle_head
from exl2jax.models.tensors import SourceTensors
from exl2jax.ops.packing import PackedLinear, unpack_linear
from exl2jax.storage import TensorFiles
from exl2jax.storage.arrays import all_finite, transposed

SAMPLES, SAMPLE_BYTES = 256, 4096
"""Pieces of a weight file, evenly spread, that go into its digest: a megabyte, whatever the file's size."""


class Tensors(Protocol):
    """A source of tensors, by the names that the stock runtime gives them."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold them."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def dtype(self, name: str) -> str:
        """Its dtype as safetensors spells it."""
        ...

    def file(self, name: str) -> Path:
        """The file that it comes from."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor; linears as `[out_features, in_features]`."""
        ...


class Model:
    """A model directory: its configuration and its tensors, read lazily. Weights come as `[K, N]` float32."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        raw: dict[str, Any],
        digest: str,
        files: Tensors,
    ) -> None:
        """Bind a checked configuration to the headers of its weight files."""
        self.directory = directory
        self.config = config
        self.raw_config = raw
        self.config_digest = digest
        self.files = files

    def embedding(self) -> np.ndarray:
        """The embedding table `[vocab, D]` float32, the model's multiplier included."""
        table = self._float(embedding_name(self.config), (self.config.vocab_size, self.config.hidden_size))
        return table if self.config.scales.embedding == 1 else table * np.float32(self.config.scales.embedding)

    def positions(self, length: int) -> np.ndarray | None:
        """Learned embeddings of the first `length` positions, `[length, D]`; None where the model has none.

        Raises `SettingsError` when the model has not learned that many.
        """
        key, known = self.config.arch.positions, self.config.max_position
        if key is None:
            return None
        if length > known:
            raise SettingsError(f"rows of {length} tokens are too long: {self.directory} knows {known} positions")
        return self._float(f"{key}.weight", (known, self.config.hidden_size))[:length]

    def module_params(self, spec: ModuleSpec, *, narrow: bool = False) -> dict[str, Any]:
        """Parameters of a module in the form `models.decoder` takes; `narrow` as in `kernel`."""
        linears = {linear.name: self.linear_params(linear, narrow=narrow) for linear in spec.linears}
        return self.plain_params(spec) | linears

    def plain_params(self, spec: ModuleSpec) -> dict[str, Any]:
        """Parameters of a module's norms and router."""
        return {norm.name: self._norm(norm) for norm in spec.norms}

    def head_params(self, *, narrow: bool = False) -> dict[str, Any]:
        """Parameters of the final norm and the head; `narrow` as in `kernel`."""
        norm = self._norm(head_norm_spec(self.config))
        return {"norm": norm, "lm_head": self.linear_params(head_spec(self.config), narrow=narrow)}

    def linear_params(self, spec: LinearSpec, *, narrow: bool = False) -> dict[str, np.ndarray]:
        """`{"kernel" [K, N], "bias" [N]?}` of a linear, float32 unless dequantized; `narrow` as in `kernel`."""
        kernel = self.kernel(spec, narrow=narrow)
        return {"kernel": kernel, "bias": self.bias(spec)} if spec.bias else {"kernel": kernel}

    def kernel(self, spec: LinearSpec, *, narrow: bool = False) -> np.ndarray:
        """The weight of a linear, `[K, N]`; `narrow` leaves it in the 16 bits of the source, where it has 16."""
        raise NotImplementedError

    def bias(self, spec: LinearSpec) -> np.ndarray:
        """The bias of a linear, `[N]` float32."""
        return self._float(f"{spec.key}.bias", (spec.columns,))

    def _norm(self, spec: NormSpec) -> dict[str, np.ndarray]:
        """Weight, with its offset added, and bias of a norm or router."""
        params = {name.rpartition(".")[2]: self._float(name, shape) for name, shape in spec.tensors.items()}
        return params | {"weight": params["weight"] + np.float32(spec.offset)} if spec.offset else params

    def _float(self, name: str, shape: tuple[int, ...], *, narrow: bool = False) -> np.ndarray:
        """A float tensor of a known shape as float32, or as stored, refused when it holds NaN or infinity."""
        self._check(name, shape)
        value = self.files.read(name)
        value = value if narrow else value.astype(np.float32)
        if not all_finite(value):
            raise ModelError(f"{self.files.file(name)}: {name} holds NaN or infinity; the source model is damaged")
        return value

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `ModelError` unless a tensor is there, a float, and of this shape."""
        if name not in self.files:
            hint = missing_hint(name, self.files, self.config)
            raise ModelError(f"{self.directory}: tensor {name} is missing from the weights{hint}")
        found, dtype = self.files.shape(name), self.files.dtype(name)
        if found != shape:
            raise ModelError(
                f"{self.files.file(name)}: {name} has shape {list(found)}, {CONFIG_NAME} implies {list(shape)}"
                f"{shape_hint(name, found, shape, self.config)}{dtype_hint(dtype)}"
            )
        if dtype not in FLOAT_DTYPES:
            raise ModelError(f"{self.files.file(name)}: {name} is {dtype}, expected {FLOAT_DTYPES}{dtype_hint(dtype)}")


class HFModel(Model):
    """A Hugging Face directory of float weights (`[out, in]` on disk, transposed here).

    `notes` say where config and tensors disagreed and what was done about it.
    """

    notes: tuple[str, ...] = ()

    def stock_config(self) -> dict[str, Any]:
        """The config in the spelling that the stock runtime reads: the source's own wherever that is one."""
        return stock_spelling(self.raw_config, self.config.arch)

    @property
    def head_name(self) -> str:
        """Name of the tensor that the head multiplies with: its own, or the tied embedding."""
        own = f"{head_spec(self.config).key}.weight"
        return own if own in self.files and not self.config.tie_word_embeddings else embedding_name(self.config)

    def copied(self) -> list[str]:
        """Tensors beside the language model, a vision tower and its projector, which are copied as they are."""
        copied = self.config.arch.copied
        return [name for name in self.files if copied and name.startswith(copied)]

    def needed(self) -> Shapes:
        """Every tensor that a conversion reads of the language model, with the shape it must have."""
        shapes: Shapes = embedding_shapes(self.config)
        for spec in module_specs(self.config):
            shapes |= spec.plain
            for linear in spec.linears:
                shapes[f"{linear.key}.weight"] = (linear.columns, linear.rows)
                if linear.bias:
                    shapes[f"{linear.key}.bias"] = (linear.columns,)
        shapes |= head_norm_spec(self.config).tensors
        head = head_spec(self.config)
        return shapes | {self.head_name: (head.columns, head.rows)}

    def check_headers(self) -> None:
        """Check presence, shape and dtype of every tensor the conversion will read, before any of it is read."""
        needed = self.needed()
        linears = [linear.key for spec in module_specs(self.config) for linear in spec.linears]
        for key in (*linears, head_spec(self.config).key):
            bias = f"{key}.bias"
            if bias in self.files and bias not in needed:
                raise ModelError(
                    f"{self.files.file(bias)}: {bias} is there, {CONFIG_NAME} implies no bias in "
                    f"{self.config.architecture}"
                )
        for name, shape in needed.items():
            self._check(name, shape)
        self._kernel_name(head_spec(self.config))  # refuses where there is no head

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32, linears as `[out, in]`; the embedding for the head that is tied to it."""
        name = self.head_name if name == f"{head_spec(self.config).key}.weight" else name
        return self._float(name, self.files.shape(name))

    def weights_digest(self) -> str:
        """SHA-256 of the headers, the file sizes and samples of the weights; it identifies the weights.

        Samples are enough: two fine-tunes of one model differ in most of their weights.
        """
        record = [[n, list(self.files.shape(n)), self.files.dtype(n)] for n in sorted(self.files)]
        sizes = [[p.name, p.stat().st_size] for p in self.files.files]
        digest = hashlib.sha256(json.dumps([record, sizes]).encode())
        for path in self.files.files:
            _add_samples(digest, path)
        return digest.hexdigest()

    def kernel(self, spec: LinearSpec, *, narrow: bool = False) -> np.ndarray:
        """The weight of a linear, `[K, N]` float32, or as stored where `narrow`; a normalised head is float32."""
        value = self._float(self._kernel_name(spec), (spec.columns, spec.rows), narrow=narrow)
        if self.config.scales.norm_head and spec == head_spec(self.config):
            value = value.astype(np.float32, copy=False)
            value = value / np.maximum(np.linalg.norm(value, axis=1, keepdims=True), 1e-12)
        return transposed(value)

    def _kernel_name(self, spec: LinearSpec) -> str:
        name = self.head_name if spec == head_spec(self.config) else f"{spec.key}.weight"
        if name == embedding_name(self.config) and not self.config.tie_word_embeddings:
            missing = f"{head_spec(self.config).key}.weight"
            raise ModelError(
                f"{self.directory}: {missing} is missing and the embeddings are not tied; download the model again, or "
                f"set tie_word_embeddings to true in {CONFIG_NAME} if its head is the embedding"
            )
        return name


class Exl2Model(Model):
    """An EXL2 directory; linears are dequantized exactly as the runtime does."""

    def kernel(self, spec: LinearSpec, *, narrow: bool = False) -> np.ndarray:
        """The dequantized weight of a linear, `[K, N]` float16 in any case, padding removed."""
        del narrow
        try:
            return unpack_linear(self.packed(spec))[:, : spec.columns]
        except FormatError as e:
            raise FormatError(f"{self.directory}: {spec.key}: {e}") from e

    def packed(self, spec: LinearSpec) -> PackedLinear:
        """The stored tensors of a linear."""
        return PackedLinear.of(self.files.read, spec.key)

    def bias(self, spec: LinearSpec) -> np.ndarray:
        """The bias of a linear, `[N]` float32, padding removed."""
        name = f"{spec.key}.bias"
        return self._float(name, self.files.shape(name))[: spec.columns]


def open_model(directory: Path, *, rope_scale: float | None = None, rope_alpha: float | None = None) -> Model:
    """Open a model directory of either kind; an EXL2 one says so in its `quantization_config`."""
    config, raw, digest = read_config(directory)
    config = config.with_rope(rope_scale, rope_alpha)
    stated = stated_quantization(raw)
    if stated is not None and stated.method == "exl2":
        return Exl2Model(directory, config, raw, digest, TensorFiles.of_exl2(directory))
    tensors, left_over = open_tensors(TensorFiles.of_source(directory), config, stated, directory)
    settled, head = settle_head(tensors, config)
    raw = without_quantization(raw)
    model = HFModel(directory, settled, _untied(raw) if settled != config else raw, digest, tensors)
    model.notes = (*tensors.notes, *left_over, *head, *_unread_notes(model, tensors))
    return model


def _untied(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of a model whose head is a tensor of its own."""
    inner = raw.get(TEXT_SECTION)
    nested = {TEXT_SECTION: {**inner, "tie_word_embeddings": False}} if isinstance(inner, dict) else {}
    return {**raw, **nested, "tie_word_embeddings": False}


def _unread_notes(model: HFModel, tensors: SourceTensors) -> list[str]:
    """A note on the tensors that nothing reads; those known to be of no use are left out of it."""
    config = model.config
    read = [*model.copied(), *model.needed(), f"{head_spec(config).key}.weight"]  # the last may be a copy, when tied
    extra = model.raw_config.get("num_nextn_predict_layers")
    ahead = range(config.num_layers, config.num_layers + extra) if isinstance(extra, int) and extra < 64 else ()
    known = (*UNUSED, *config.arch.unused, *(f"model.layers.{i}.*" for i in ahead))
    unread = [n for n in tensors.unread(read) if not any(fnmatchcase(n, pattern) for pattern in known)]
    if not unread:
        return []
    layers = stored_layers(unread)
    more = f"; {CONFIG_NAME} says {config.num_layers} layers, the files hold {layers}"
    hint = more if layers > config.num_layers else ""
    return [f"{len(unread)} stored tensors are read by nothing, such as {unread[0]}{hint}"]


def load_exl2(directory: Path) -> Exl2Model:
    """Open an EXL2 directory; its tensors are read when asked for. `FormatError` when it is another kind of model."""
    model = open_model(directory)
    if not isinstance(model, Exl2Model):
        raise FormatError(f"{directory / CONFIG_NAME}: no quantization_config, so this is no EXL2 directory")
    return model


def _add_samples(digest: Any, path: Path) -> None:
    """Feed pieces of a file, or the whole of a small one, to a hash."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for offset in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
            file.seek(offset)
            digest.update(file.read(SAMPLE_BYTES))
