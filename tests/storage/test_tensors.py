"""The safetensors reader: what it finds, and one clear message for every damaged directory."""

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from exl2jax.errors import ModelError
from exl2jax.storage import TensorFiles

INDEX = "model.safetensors.index.json"


def write_shards(directory: Path) -> dict[str, np.ndarray]:
    """Two shards with an index."""
    tensors = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.arange(4).astype(ml_dtypes.bfloat16),
        "c": np.arange(5, dtype=np.int32),
    }
    save_file({"a": tensors["a"]}, directory / "one.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, directory / "two.safetensors")
    write_index(directory, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return tensors


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def test_tensors_of_several_files(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path)
    files = TensorFiles.of_source(tmp_path)
    assert sorted(files) == ["a", "b", "c"]
    assert "a" in files
    assert "d" not in files
    assert {n: files.dtype(n) for n in files} == {"a": "F16", "b": "BF16", "c": "I32"}
    assert files.file("c") == tmp_path / "two.safetensors"
    for name, tensor in tensors.items():
        assert files.shape(name) == tensor.shape
        assert files.read(name).dtype == tensor.dtype
        assert np.array_equal(files.read(name), tensor)


def test_an_index_decides_which_files_count(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"a": np.ones(1)}, tmp_path / "consolidated.safetensors")
    assert TensorFiles.of_source(tmp_path).shape("a") == (2, 3)


def test_without_an_index_every_file_counts(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    assert sorted(TensorFiles.of_source(tmp_path)) == ["a", "b", "c"]


def test_an_exl2_directory_is_globbed_whatever_its_index_says(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_index(tmp_path, {"a": "gone.safetensors"})
    assert sorted(TensorFiles.of_exl2(tmp_path)) == ["a", "b", "c"]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    files = TensorFiles.of_source(tmp_path)
    for access in (files.shape, files.dtype, files.file, files.read):
        with pytest.raises(ModelError, match=re.escape(f"{tmp_path}: tensor d is missing")):
            access("d")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    write_shards(tmp_path)
    path = tmp_path / "two.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"two\.safetensors: not a readable safetensors file"):
        TensorFiles.of_source(tmp_path)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors file .* download it again"):
        TensorFiles.of_source(tmp_path)


def test_a_file_that_vanishes_between_header_and_data(tmp_path: Path) -> None:
    write_shards(tmp_path)
    files = TensorFiles.of_source(tmp_path)
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(ModelError, match=r"one\.safetensors"):
        files.read("a")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelError, match=r"two\.safetensors: named by .*index\.json but missing; download it again"):
        TensorFiles.of_source(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"b": np.ones(4)}, tmp_path / "zzz.safetensors")
    (tmp_path / INDEX).unlink()
    with pytest.raises(ModelError, match=r"zzz\.safetensors: tensor b also stands in two\.safetensors; remove one"):
        TensorFiles.of_source(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../one.safetensors"},
        {"a": "/etc/hostname"},
        {"a": "sub/one.safetensors"},
        {"a": ".."},
        {"a": "."},
        {"a": ""},
        {"a": 3},
        {"a": None},
        {"a": ["one.safetensors"]},
        {},
        [],
        ["one.safetensors"],
        "one.safetensors",
        None,
    ],
)
def test_an_index_must_map_to_files_beside_it(tmp_path: Path, weight_map: object) -> None:
    write_shards(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(ModelError, match=r"index\.json: weight_map must map tensors to files of the same directory"):
        TensorFiles.of_source(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "3", '{"weight_map"', "null", "{}"])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"index\.json: "):
        TensorFiles.of_source(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights found$"):
        TensorFiles.of_source(tmp_path)
    with pytest.raises(ModelError, match=r"no \*\.safetensors files found"):
        TensorFiles.of_exl2(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"it has pytorch_model\.bin: convert the model to safetensors first"):
        TensorFiles.of_source(tmp_path)
