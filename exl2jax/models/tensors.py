"""A source's tensors under the names that the stock runtime gives them: renamed, split, transposed, rescaled.

`SourceTensors` reads them so; `to_source` is the inverse.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from exl2jax.errors import ModelError
from exl2jax.models.config import ModelConfig
from exl2jax.models.registry import Architecture, Fused
from exl2jax.storage import TensorFiles
from exl2jax.storage.arrays import transposed

FLOAT8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
"""Suffix of the factors of an FP8 weight `[N, K]`: `[ceil(N / b), ceil(K / b)]`, one for each block."""


class SourceTensors:
    """The tensors of a Hugging Face directory by canonical name; linears come as `[out_features, in_features]`.

    Reads like `TensorFiles`, which it wraps.
    """

    def __init__(self, files: TensorFiles, config: ModelConfig, block: tuple[int, int] | None = None) -> None:
        """Rename the tensors of the files; `block` is the block size of FP8 weights, where there are any.

        Raises `ModelError` when two tensors get the same name.
        """
        self.files = files.files
        self._files = files
        self._config = config
        self._block = block
        self._sources: dict[str, str] = {}
        for name in files:
            canonical = canonical_name(name, config.arch)
            if canonical in self._sources:
                first = self._sources[canonical]
                raise ModelError(f"{files.file(name)}: {name} and {first} both stand for {canonical}; remove one")
            self._sources[canonical] = name

    def __contains__(self, name: str) -> bool:
        return name in self._sources or self._fused(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        source, fused = self._find(name)
        shape = self._files.shape(source)
        if len(shape) == 2 and _is_transposed(name, self._config):
            shape = shape[::-1]
        if fused is None:
            return shape
        rows = _part_sizes(fused, self._config)
        if not shape or shape[0] != sum(rows):
            raise ModelError(
                f"{self._files.file(source)}: {source} has shape {list(self._files.shape(source))}, "
                f"config.json implies {sum(rows)} outputs for {', '.join(fused.parts)}"
            )
        if fused.experts:
            shape = (rows[0], shape[1])
            return shape[::-1] if fused.transposed else shape
        return (rows[fused.parts.index(_module_name(name))], *shape[1:])

    def dtype(self, name: str) -> str:
        """Stored dtype; an FP8 weight with its factors reads as float32 and counts as such."""
        source = self._find(name)[0]
        dtype = self._files.dtype(source)
        return "F32" if dtype == FLOAT8 and self._block and source + SCALE_SUFFIX in self._files else dtype

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files.file(self._find(name)[0])

    def check_scales(self) -> None:
        """Refuse FP8 weights whose table of factors has another shape than the blocks need."""
        for name in self._files:
            if self._files.dtype(name) == FLOAT8 and self._block and name + SCALE_SUFFIX in self._files:
                _require_scales(self._files.shape(name), self._files.shape(name + SCALE_SUFFIX), self._block, name)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the choice of the files."""
        return self._files.notes

    def unread(self, needed: Iterable[str]) -> list[str]:
        """Names in the source of the tensors that are part of none of the `needed` ones."""
        sources = {self._find(name)[0] for name in needed}
        return sorted(set(self._files) - sources - {source + SCALE_SUFFIX for source in sources})

    def read(self, name: str, rows_only: slice | None = None) -> np.ndarray:
        """The tensor in its stored dtype, an FP8 weight in float32 with its factors applied.

        With `rows_only` only these rows of a tensor outside of the layers.
        """
        source, fused = self._find(name)
        if rows_only is not None:
            whole = self._files.dtype(source) == FLOAT8 and self._block
            return self.read(name)[rows_only] if whole else self._files.read(source, rows_only)
        rows = None if fused is None else _part_rows(fused, name, self._config)
        # Read only the part's own rows where they are contiguous: the experts of a layer may not all fit in memory.
        part = rows if isinstance(rows, slice) and not self._block and not self._config.arch.transposed else None
        value = self._files.read(source, part)
        if self._files.dtype(source) == FLOAT8 and self._block:
            value = rescale(value, self._files.read(source + SCALE_SUFFIX), self._block, source)
        if value.ndim == 2 and _is_transposed(name, self._config):
            value = value.T
        if fused is None:
            return value
        value = value[rows] if part is None else value
        return value.T if fused.transposed else value

    def _find(self, name: str) -> tuple[str, Fused | None]:
        """The source's name of a tensor, and how it is fused with others, if it is."""
        if name in self._sources:
            return self._sources[name], None
        fused = self._fused(name)
        if fused is not None:
            return self._sources[_fused_name(name, fused)], fused
        return name, None  # the reader says that it is missing

    def _fused(self, name: str) -> Fused | None:
        fused = _fused_of(name, self._config.arch)
        return fused if fused and _fused_name(name, fused) in self._sources else None


def to_source(
    names: Iterable[str], read: Callable[[str], np.ndarray], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors in the source's form: put together, transposed, renamed. The inverse of `SourceTensors` without aliases.

    `names` are canonical. `read` gives a tensor by its canonical name, linears `[out_features, in_features]`. One
    tensor of the source is made at a time, in the order of their first parts. Raises `ModelError` where `names` lack a
    part.
    """
    wholes: dict[str, list[str]] = {}
    for name in names:
        fused = _fused_of(name, config.arch)
        wholes.setdefault(_fused_name(name, fused) if fused else name, []).append(name)
    for whole, parts in wholes.items():
        fused = _fused_of(parts[0], config.arch)
        value = _joined(whole, parts, fused, read, config) if fused else read(whole)
        if value.ndim == 2 and _is_transposed(whole, config):
            value = transposed(value)
        yield source_name(whole, config.arch), np.ascontiguousarray(value)


def _joined(
    whole: str, parts: list[str], fused: Fused, read: Callable[[str], np.ndarray], config: ModelConfig
) -> np.ndarray:
    """The fused tensor of `parts`; one part beside it is in memory."""
    sizes = _part_sizes(fused, config)
    if len(parts) != len(sizes):
        raise ModelError(f"{whole} is made of {len(sizes)} tensors, only these are there: {', '.join(parts)}")
    value = np.empty(0)
    for i, name in enumerate(parts):
        part = read(name).T if fused.transposed else read(name)
        if i == 0:
            value = np.empty((sum(sizes), *part.shape[1:]), part.dtype)
        value[_part_rows(fused, name, config)] = part
    return value


def canonical_name(name: str, arch: Architecture) -> str:
    """The stock runtime's name of a tensor of the source."""
    return rename(name, arch.aliases + arch.renames)


def source_name(name: str, arch: Architecture) -> str:
    """The source's name of a tensor of the stock runtime: the renames undone, the last one first."""
    undone = (("^" + new, old[1:]) if old.startswith("^") else (new, old) for old, new in reversed(arch.renames))
    return rename(name, tuple(undone))


def rename(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    """A tensor's name with the replacements made in order; `^` anchors one at the start."""
    for old, new in renames:
        if not old.startswith("^"):
            name = name.replace(old, new)
        elif name.startswith(old[1:]):
            name = new + name[len(old) - 1 :]
    return name


def rescale(value: np.ndarray, scale: np.ndarray, block: tuple[int, int], name: str) -> np.ndarray:
    """An FP8 weight `[N, K]` times the factor of each block, float32."""
    _require_scales(value.shape, scale.shape, block, name)
    factors = scale.astype(np.float32).repeat(block[0], axis=0).repeat(block[1], axis=1)
    return value.astype(np.float32) * factors[: value.shape[0], : value.shape[1]]


def _require_scales(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int], name: str) -> None:
    wanted = tuple(-(-size // step) for size, step in zip(shape, block, strict=False))
    if len(shape) != len(block) or scales != wanted:
        raise ModelError(f"{name}{SCALE_SUFFIX} has shape {list(scales)}, blocks of {block} need {list(wanted)}")


def _module_name(name: str) -> str:
    """The linear that a tensor belongs to: `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else ""


def _fused_of(name: str, arch: Architecture) -> Fused | None:
    """The entry by which the source may fuse a tensor with others, None without one."""
    inside = ".layers." in name
    return next((fused for fused in arch.fused if inside and _module_name(name) in fused.parts), None)


def _is_transposed(name: str, config: ModelConfig) -> bool:
    """Whether the source holds a weight as `[in_features, out_features]`."""
    return config.arch.transposed and ".layers." in name


def _fused_name(name: str, fused: Fused) -> str:
    """The name of the fused tensor that holds the part `name`."""
    prefix, _, rest = name.partition(".layers.")
    return f"{prefix}.layers.{rest.partition('.')[0]}.{fused.source}.{rest.rpartition('.')[2]}"


def _part_sizes(fused: Fused, config: ModelConfig) -> list[int]:
    """Output rows of each part."""
    if fused.experts:
        return [config.intermediate_size] * config.num_experts
    sizes = {
        "q_proj": config.num_heads * config.head_dim,
        "k_proj": config.num_kv_heads * config.head_dim,
        "v_proj": config.num_kv_heads * config.head_dim,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
    }
    return [sizes[part] for part in fused.parts]


def _part_rows(fused: Fused, name: str, config: ModelConfig) -> np.ndarray | slice:
    """The rows of the fused tensor that belong to a part, the linear of the tensor `name`."""
    sizes = _part_sizes(fused, config)
    index = int(name.split(".")[-3]) if fused.experts else fused.parts.index(_module_name(name))
    start = sum(sizes[:index])
    if not fused.interleaved:
        return slice(start, start + sizes[index])
    width, kv_heads = config.head_dim, config.num_kv_heads
    group = config.num_heads // kv_heads
    rows = np.arange(sum(sizes)).reshape(kv_heads, group + 2, width)
    return {0: rows[:, :group], 1: rows[:, group], 2: rows[:, group + 1]}[index].reshape(-1)
