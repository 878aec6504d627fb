"""Shards: names, sizes, and that nothing is visible before everything is."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from exl2jax.errors import StorageError
from exl2jax.storage import ShardWriter

KILOBYTE = 1024
HALF_MB = np.zeros(512 * KILOBYTE, np.uint8)


def visible(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob("*.safetensors"))


def fill(directory: Path, shard_mb: float, sizes_kb: list[int]) -> tuple[Path, ...]:
    writer = ShardWriter(directory, shard_mb)
    for i, size in enumerate(sizes_kb):
        writer.add(f"t{i:02}", np.full(size * KILOBYTE, i, np.uint8))
        assert visible(directory) == [], "a loader must not see shards of an unfinished model"
    return writer.finish()


def test_one_file_when_everything_fits(tmp_path: Path) -> None:
    paths = fill(tmp_path, 1, [400, 600])
    assert [p.name for p in paths] == ["output.safetensors"]
    assert visible(tmp_path) == ["output.safetensors"]


def test_zero_means_one_file_of_any_size(tmp_path: Path) -> None:
    assert [p.name for p in fill(tmp_path, 0, [600] * 5)] == ["output.safetensors"]


def test_several_shards_are_numbered_and_bounded(tmp_path: Path) -> None:
    sizes = [300, 300, 300, 300, 1024, 10]
    paths = fill(tmp_path, 1, sizes)
    assert [p.name for p in paths] == [f"output-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert sorted(p.name for p in tmp_path.iterdir()) == visible(tmp_path)
    content = [load_file(p) for p in paths]
    assert [sorted(c) for c in content] == [["t00", "t01", "t02"], ["t03"], ["t04"], ["t05"]]
    assert all(sum(t.nbytes for t in c.values()) <= 1024 * KILOBYTE for c in content)
    for i, size in enumerate(sizes):
        (tensor,) = (c[f"t{i:02}"] for c in content if f"t{i:02}" in c)
        assert np.array_equal(tensor, np.full(size * KILOBYTE, i, np.uint8))


def test_a_fraction_of_a_megabyte(tmp_path: Path) -> None:
    assert len(fill(tmp_path, 0.5, [512, 512])) == 2


def test_a_tensor_that_fits_no_shard_is_refused_by_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 1)
    with pytest.raises(StorageError, match=r"lm_head\.q_weight: 2 MB do not fit a shard; raise `shard_size`"):
        writer.add("lm_head.q_weight", np.zeros(2 * 1024 * KILOBYTE, np.uint8))


def test_strided_tensors_are_written_in_order(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0)
    tensor = np.arange(12, dtype=np.int32).reshape(3, 4).T
    writer.add("a", tensor)
    (path,) = writer.finish()
    assert np.array_equal(load_file(path)["a"], tensor)


def test_what_an_earlier_try_left_is_cleared_and_other_files_stay(tmp_path: Path) -> None:
    fill(tmp_path, 0.5, [512, 512, 512])
    ShardWriter(tmp_path, 0.5).add("left over", HALF_MB)
    (tmp_path / "output_temp_00007.safetensors.part").touch()
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "adapter.safetensors").touch()
    writer = ShardWriter(tmp_path, 0)
    writer.add("a", HALF_MB)
    writer.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "output.safetensors", "tokenizer.json"]


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "1", tmp_path / "2"]
    for folder in folders:
        folder.mkdir()
        fill(folder, 0.5, [200, 400, 100])
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
