"""A model that a transform rewrites while it is read, one tensor at a time; its callers see an ordinary model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from exl2jax.errors import NumericalError, SettingsError
from exl2jax.models.config import ModelConfig
from exl2jax.models.modules import LinearSpec, ModuleSpec, embedding_name, head_norm_spec, head_spec, module_specs
from exl2jax.models.source import Exl2Model, HFModel, Tensors
from exl2jax.variants import Choice, choose
from exl2jax.variants.transforms import (
    CLIPPED,
    LAYER_NORM,
    NO_GATE,
    NORMED_HEAD,
    POSITIONS,
    POST_NORMS,
    TOWER,
    Layout,
    Pair,
    Rewritten,
)

RECORD = "transform"


def transformed(model: HFModel, choice: Choice | None) -> HFModel:
    """The model as a chosen transform rewrites it; itself for None.

    Raises `SettingsError` where the transform does not fit the architecture, before any weight is read.
    """
    return model if choice is None else TransformedModel(model, choice)


def transform_record(choice: Choice | None) -> dict[str, str]:
    """The entry of the transform in a result's `quantization_config`; loaders ignore it, `transformed_for` reads it."""
    return {} if choice is None else {RECORD: choice.text.partition("=")[2]}


def transformed_for(result: Exl2Model, source: HFModel) -> HFModel:
    """The source as it was rewritten before `result` was made of it, to compare tensor by tensor."""
    asked = result.raw_config["quantization_config"].get(RECORD)
    return source if asked is None else transformed(source, choose("transform", str(asked)))


class TransformedModel(HFModel):
    """A Hugging Face model whose tensors are rewritten as they are read; `weights_digest` is that of the source."""

    def __init__(self, source: HFModel, choice: Choice) -> None:
        """Ask the transform which tensors it rewrites; a tied head among them gets a tensor of its own."""
        rewritten: Rewritten = choice.function(layout_of(source.config), source.tensor, choice.settings)
        head = _weight(head_spec(source.config))
        files = _RewrittenTensors(source.files, rewritten, {head: source.head_name}, _linear_tensors(source.config))
        unknown = sorted(name for name in rewritten if name != head and name not in source.files)
        if unknown:
            raise SettingsError(f"transform {choice.name}: {source.directory} has no tensor {unknown[0]}")
        config, raw = source.config, source.raw_config
        if config.tie_word_embeddings and head in rewritten:
            config, raw = replace(config, tie_word_embeddings=False), {**raw, "tie_word_embeddings": False}
        super().__init__(source.directory, config, raw, source.config_digest, files)
        self._source = source

    def weights_digest(self) -> str:
        """The digest of the source's weights; the recipe names the transform."""
        return self._source.weights_digest()


class _RewrittenTensors:
    """The tensors of a model, some of them computed as they are read; reads like what it wraps.

    `stands_for` are names of tensors that may have no header of their own, with those whose headers tell of them.
    Weights and biases of linears come as float32, other rewritten tensors in half precision, in which they are stored.
    """

    def __init__(
        self, files: Tensors, rewritten: Rewritten, stands_for: Mapping[str, str], linears: frozenset[str]
    ) -> None:
        self._files, self._rewritten, self._stands_for, self._linears = files, rewritten, stands_for, linears

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the source."""
        return self._files.files

    def __contains__(self, name: str) -> bool:
        return name in self._rewritten or name in self._files

    def __iter__(self) -> Iterator[str]:
        yield from self._files
        yield from (name for name in self._rewritten if name not in self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which a transform leaves as it is."""
        return self._files.shape(self._named(name))

    def dtype(self, name: str) -> str:
        """Dtype that `read` gives, as safetensors spells it."""
        if name not in self._rewritten:
            return self._files.dtype(name)
        return "F32" if name in self._linears else "F16"

    def file(self, name: str) -> Path:
        """The source's file that a tensor comes from."""
        return self._files.file(self._named(name))

    def read(self, name: str) -> np.ndarray:
        """The tensor, rewritten; `NumericalError` where it does not fit the precision that it is stored in."""
        if name not in self._rewritten:
            return self._files.read(name)
        value = self._rewritten[name]()
        if value.shape != self.shape(name):
            raise SettingsError(
                f"the transform makes {name} {list(value.shape)}; it must stay {list(self.shape(name))}"
            )
        dtype = np.float32 if name in self._linears else np.float16
        with np.errstate(over="ignore"):
            value = value.astype(dtype)
        if not np.isfinite(value).all():
            raise NumericalError(
                f"{self.file(name)}: {name} does not fit {np.dtype(dtype)} once it is transformed; "
                "choose another transform, or none"
            )
        return value

    def _named(self, name: str) -> str:
        return self._stands_for.get(name, name) if name in self._rewritten else name


def layout_of(config: ModelConfig) -> Layout:
    """The description of a model that a transform gets."""
    specs, final, head = module_specs(config), head_norm_spec(config), head_spec(config)
    readers: dict[str, tuple[str, ...]] = {}
    for spec in specs:
        by_name = {norm.name: f"{norm.key}.weight" for norm in spec.norms}
        first = [_weight(linear) for group in spec.stages[0] for linear in group]
        readers[by_name["norm"]] = (*first, *(by_name[name] for name in ("router",) if name in by_name))
    readers[f"{final.key}.weight"] = (_weight(head),)
    linears = [linear for spec in specs for linear in spec.linears]
    return Layout(
        name=config.architecture,
        traits=_traits(config),
        hidden=config.hidden_size,
        embedding=embedding_name(config),
        head=_weight(head),
        offset=config.arch.norm_offset,
        readers=readers,
        writers=[linear.key for spec in specs for group in spec.stages[-1] for linear in group],
        pairs=[pair for spec in specs for pair in _pairs(config, spec)],
        biased=frozenset(linear.key for linear in linears if linear.bias),
    )


def _traits(config: ModelConfig) -> frozenset[str]:
    """The parts of the model that a transform may not handle."""
    arch = config.arch
    found = {
        LAYER_NORM: arch.norm != "rms",
        POST_NORMS: bool(arch.norms.attention_post or arch.norms.mlp_post),
        POSITIONS: arch.positions is not None,
        NORMED_HEAD: config.scales.norm_head,
        TOWER: bool(arch.copied),
        NO_GATE: arch.mlp[0] is None,
        CLIPPED: config.scales.clip is not None,
    }
    return frozenset(trait for trait, there in found.items() if there)


def _pairs(config: ModelConfig, spec: ModuleSpec) -> Iterator[Pair]:
    """Linears of a module whose outputs another reads, each channel by itself: v and o, up and down."""
    keys = {linear.name: linear.key for linear in spec.linears}
    group = config.num_heads // config.num_kv_heads
    shared = np.arange(config.num_kv_heads * config.head_dim).reshape(-1, config.head_dim)
    inner = np.arange(config.intermediate_size)
    for name, key in keys.items():
        role, _, expert = name.partition(".")
        if role == "v_proj":
            yield Pair(first=key, second=keys["o_proj"], source=shared.repeat(group, axis=0).reshape(-1))
        elif role == "up_proj":
            yield Pair(first=key, second=keys["down_proj"], source=inner)
        elif role == "w3":
            yield Pair(first=key, second=keys[f"w2.{expert}"], source=inner)


def _linear_tensors(config: ModelConfig) -> frozenset[str]:
    """Names of the weights and biases of all linears, the head among them."""
    linears: Iterable[LinearSpec] = (linear for spec in module_specs(config) for linear in spec.linears)
    keys = [*(linear.key for linear in linears), head_spec(config).key]
    return frozenset(f"{key}.{part}" for key in keys for part in ("weight", "bias"))


def _weight(linear: LinearSpec) -> str:
    return f"{linear.key}.weight"
