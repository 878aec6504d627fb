"""From canonical tensors back to the source's: `to_source` undoes `SourceTensors`, name by name and bit by bit."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from exl2jax.errors import ModelError
from exl2jax.models import (
    ModelConfig,
    embedding_shapes,
    head_norm_spec,
    head_spec,
    module_specs,
    open_model,
    to_source,
)
from exl2jax.models.architectures import ARCHITECTURES
from exl2jax.models.tensors import SourceTensors, canonical_name, source_name
from exl2jax.storage import TensorFiles
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import TinyArchitecture, write_tiny

PUBLISHED = {"gpt2": ("", "transformer.")}
"""Prefixes of a tiny source that come back as others, where an architecture is published under both."""


def expected_name(case: str, name: str) -> str:
    """The name of a tensor of a tiny source on the way back."""
    old, new = PUBLISHED.get(case, ("", ""))
    return name if name.startswith(new) else new + name.removeprefix(old)


def canonical_names(config: ModelConfig) -> Iterator[str]:
    """Every tensor of a language model as the stock runtime calls it, the head as well if it is tied."""
    yield from embedding_shapes(config)
    yield from head_norm_spec(config).tensors
    for spec in module_specs(config):
        yield from spec.plain
        for linear in spec.linears:
            yield f"{linear.key}.weight"
            if linear.bias:
                yield f"{linear.key}.bias"
    yield f"{head_spec(config).key}.weight"


def test_every_architecture_has_a_case() -> None:
    assert {tiny.architecture for tiny in TINY.values()} | {"LlamaForCausalLM"} == set(ARCHITECTURES)


@pytest.mark.parametrize("case", TINY)
def test_names_have_an_inverse(case: str, tmp_path: Path) -> None:
    arch = ARCHITECTURES[TINY[case].architecture]
    canonical = {*canonical_names(open_model(write_tiny(tmp_path, TINY[case])).config)}
    canonical |= {canonical_name(name, arch) for name in TINY[case].shapes()}
    assert {name: canonical_name(source_name(name, arch), arch) for name in canonical} == {n: n for n in canonical}
    for name in TINY[case].shapes():
        assert source_name(canonical_name(name, arch), arch) == expected_name(case, name)


@pytest.mark.parametrize("case", TINY)
def test_the_source_comes_back_to_the_bit(case: str, tmp_path: Path) -> None:
    model = open_model(write_tiny(tmp_path, TINY[case]))
    source = load_file(tmp_path / "model.safetensors")
    names = [name for name in canonical_names(model.config) if name in model.files]
    names += [name for name in model.files if name.startswith(model.config.arch.copied or "\n")]
    found = dict(to_source(names, model.files.read, model.config))
    assert set(found) == {expected_name(case, name) for name in source}
    for name, tensor in source.items():
        back = found[expected_name(case, name)]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape) and back.tobytes() == tensor.tobytes(), name


@given(kv_heads=st.integers(1, 4), group=st.integers(1, 4), width=st.sampled_from((2, 6)), hidden=st.integers(1, 3))
def test_interleaved_heads_come_back(
    kv_heads: int, group: int, width: int, hidden: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    heads = {"num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads, "head_dim": width}
    folder = tmp_path_factory.mktemp("internlm2")
    tiny = TINY["internlm2"]
    write_tiny(folder, TinyArchitecture(tiny.architecture, {**tiny.config, **heads, "num_hidden_layers": 1}))
    config = open_model(folder).config
    name = "model.layers.0.attention.wqkv.weight"
    whole = np.arange((kv_heads * (group + 2)) * width * hidden, dtype=np.float32).reshape(-1, hidden)
    save_file({name: whole}, folder / "model.safetensors")
    files = SourceTensors(TensorFiles.of_source(folder), config)
    parts = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    ((found, value),) = to_source(parts, files.read, config)
    assert found == name and np.array_equal(value, whole)


def test_one_tensor_is_made_at_a_time(tmp_path: Path) -> None:
    model = open_model(write_tiny(tmp_path, TINY["dbrx"]))
    read: list[str] = []

    def counted(name: str) -> np.ndarray:
        read.append(name)
        return model.files.read(name)

    names = [f"{linear.key}.weight" for spec in module_specs(model.config) for linear in spec.linears]
    made = to_source(names, counted, model.config)
    assert not read
    assert next(made)[0] == "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight"
    assert read == names[:3]


def test_missing_parts_are_named(tmp_path: Path) -> None:
    model = open_model(write_tiny(tmp_path, TINY["phi3"]))
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk"]
    with pytest.raises(ModelError, match=r"qkv_proj.weight is made of 3 tensors, only these are there: .*q_proj"):
        list(to_source(names, model.files.read, model.config))
