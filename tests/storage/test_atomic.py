"""Commit by rename: whatever fails, a reader sees the old file or the new one."""

import errno
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from exl2jax.errors import JobError, ModelError, StorageError
from exl2jax.storage import make_directory, read_json, write_atomically, write_json, write_tensors


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def write(temporary: Path) -> None:
        assert temporary.parent == tmp_path, "a rename works within one file system only"
        temporary.write_text("half", encoding="utf-8")
        assert not path.exists()
        temporary.write_text("whole", encoding="utf-8")

    write_atomically(path, write)
    assert path.read_text(encoding="utf-8") == "whole"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyError("a bug"), MemoryError()]
)
def test_a_failure_leaves_the_old_file(tmp_path: Path, failure: Exception) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")

    def write(temporary: Path) -> None:
        temporary.write_text("ne", encoding="utf-8")
        raise failure

    expected = StorageError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as caught:
        write_atomically(path, write)
    if expected is StorageError:
        assert str(path) in str(caught.value)
        assert "No space left" in str(caught.value)
        assert "free some space" in str(caught.value)
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")

    def write(temporary: Path) -> None:
        temporary.write_text("ne", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text(encoding="utf-8") == "old"


def test_a_failing_rename_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "occupied"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(StorageError, match="occupied: cannot write"):
        write_json(path, {"a": 1})
    assert names(tmp_path) == ["occupied"]


@pytest.mark.parametrize("place", ["missing/a", "file/a"])
def test_a_place_that_cannot_hold_files(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=f"{place}.json: cannot write"):
        write_json(tmp_path / f"{place}.json", 1)
    with pytest.raises(StorageError, match=f"{place}.safetensors: cannot write"):
        write_tensors(tmp_path / f"{place}.safetensors", {"a": np.zeros(3)})


def test_tensors_come_back_as_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "f16": rng.standard_normal(7).astype(np.float16),
        "bf16": rng.standard_normal((2, 2)).astype(ml_dtypes.bfloat16),
        "i32": rng.integers(-9, 9, (2, 3, 4)).astype(np.int32),
        "i16": np.zeros(0, np.int16),
        "transposed": rng.standard_normal((4, 6)).astype(np.float32).T,
        "strided": np.arange(12, dtype=np.int32)[::3],
    }
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"format": "pt"})
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert np.array_equal(back[name], tensor), name


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {name: np.full(3, i, np.float32) for i, name in enumerate("bca")}
    write_tensors(tmp_path / "1", tensors)
    write_tensors(tmp_path / "2", dict(sorted(tensors.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_json_is_readable_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"name": "Größe – 大", "list": [1, 2.5, None], "deep": {"x": True}}
    write_json(path, value)
    text = path.read_text(encoding="utf-8")
    assert "Größe – 大" in text
    assert text.endswith("}\n")
    assert read_json(path, JobError, "the job file") == value == json.loads(text)


def test_json_never_holds_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert path.read_text(encoding="utf-8") == "1\n"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1,}', b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1} {"b": 2}'])
def test_damaged_json_names_the_file_and_what_it_should_be(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.json"
    path.write_bytes(content)
    with pytest.raises(JobError, match=r"job\.json: the job file cannot be read"):
        read_json(path, JobError, "the job file")


def test_missing_json_and_a_directory_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: the configuration is missing"):
        read_json(tmp_path / "config.json", ModelError, "the configuration")
    with pytest.raises(ModelError, match="the configuration cannot be read"):
        read_json(tmp_path, ModelError, "the configuration")


def test_make_directory(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    make_directory(path, "the output directory")
    make_directory(path, "the output directory")
    assert names(path) == []
    (path / "file").touch()
    with pytest.raises(StorageError, match="file: the output directory is not a writable directory"):
        make_directory(path / "file", "the output directory")
    with pytest.raises(StorageError, match="the output directory"):
        make_directory(path / "file" / "below", "the output directory")
