from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from exl2jax.calibration import NOISE_ID, CalibrationConfig, load_rows
from exl2jax.calibration.ready import ready_rows
from exl2jax.errors import CalibrationError

IDS = np.arange(60).reshape(5, 12)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_files_of_rows_are_read_as_they_are(tmp_path: Path, dtype: type, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".npz":
        np.savez(path, input_ids=IDS.astype(dtype))
    else:
        save_file({"input_ids": IDS.astype(dtype)}, path)
    rows = load_rows(CalibrationConfig(source=path), None, vocab_size=60)
    np.testing.assert_array_equal(rows.input_ids, IDS)
    assert rows.input_ids.dtype == np.int32
    assert rows.domains == ("tokens",) * 5
    assert rows.tokenizer == ""
    part = load_rows(CalibrationConfig(source=str(path), rows=2, length=7), None, vocab_size=60)
    np.testing.assert_array_equal(part.input_ids, IDS[:2, :7])


@settings(deadline=None)
@given(data=st.data(), left=st.booleans())
def test_padding_moves_to_the_end(data: st.DataObject, left: bool) -> None:
    counts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    ids, mask = np.zeros((len(counts), 9), np.int64), np.zeros((len(counts), 9), np.int64)
    for row, count in enumerate(counts):
        place = slice(9 - count, 9) if left else slice(0, count)
        ids[row, place], mask[row, place] = np.arange(1, count + 1), 1
    block = ready_rows(ids, mask, where="test", rows=None, length=None)
    if min(counts) == 9:
        assert block.mask is None
        return
    assert block.mask is not None
    for row, count in enumerate(counts):
        assert block.ids[row, :count].tolist() == list(range(1, count + 1))
        assert block.mask[row].tolist() == [1] * count + [0] * (9 - count)


def test_a_mask_in_the_file_is_kept(tmp_path: Path) -> None:
    mask = (np.arange(12) < np.array([12, 5, 12, 12, 1])[:, None]).astype(np.int64)
    save_file({"input_ids": np.where(mask == 1, IDS, -100), "attention_mask": mask}, tmp_path / "a.safetensors")
    rows = load_rows(CalibrationConfig(source=tmp_path / "a.safetensors"), None, vocab_size=60)
    assert rows.attention_mask is not None
    np.testing.assert_array_equal(rows.attention_mask, mask)
    np.testing.assert_array_equal(rows.input_ids, np.where(mask == 1, IDS, 0))
    assert set(rows.tensors()) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"input_ids": IDS}, {"rows": 6}, "5 rows are there, 6 are needed"),
        ({"input_ids": IDS}, {"length": 13}, "rows of 12 tokens are there, 13 are needed"),
        ({"tokens": IDS}, {}, "no tensor 'input_ids'"),
        ({"input_ids": IDS[0]}, {}, r"input_ids is int64 \[12\]"),
        ({"input_ids": IDS.astype(np.float32)}, {}, "input_ids is float32"),
        ({"input_ids": IDS[:0]}, {}, r"\[0, 12\]"),
        ({"input_ids": IDS + 1}, {}, "token id 60 at row 4, position 11 .* vocabulary of 60"),
        ({"input_ids": np.where(IDS == 30, -1, IDS)}, {}, "token id -1 at row 2, position 6"),
        ({"input_ids": IDS + 2**40}, {}, "exceed 32 bits"),
        ({"input_ids": IDS, "attention_mask": np.ones((5, 11), np.int64)}, {}, "they must agree"),
        ({"input_ids": IDS, "attention_mask": np.arange(60).reshape(5, 12) % 2}, {}, "not one unbroken run"),
        ({"input_ids": IDS, "attention_mask": np.zeros((5, 12), np.int64)}, {}, "not one unbroken run"),
    ],
)
def test_rows_that_do_not_serve(
    tmp_path: Path, tensors: dict[str, np.ndarray], settings: dict[str, int], message: str
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CalibrationError, match=message):
        load_rows(CalibrationConfig(source=tmp_path / "a.safetensors", **settings), None, vocab_size=60)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz"])
def test_damaged_files_are_named(write: Callable[[str, bytes], Path], name: str) -> None:
    path = write(name, b"not such a file at all")
    with pytest.raises(CalibrationError, match=f"{name}: not a readable"):
        load_rows(CalibrationConfig(source=path), None, vocab_size=60)


def test_noise_ids_only_where_asked_for_and_only_whole_rows(tmp_path: Path) -> None:
    ids = IDS.copy()
    ids[3] = NOISE_ID
    np.savez(tmp_path / "a.npz", input_ids=ids)
    with pytest.raises(CalibrationError, match="token id -1"):
        load_rows(CalibrationConfig(source=tmp_path / "a.npz"), None, vocab_size=60)
    rows = load_rows(CalibrationConfig(source=tmp_path / "a.npz", noise_rows=1), None, vocab_size=60)
    np.testing.assert_array_equal(rows.input_ids, ids)


def test_rows_longer_than_the_context(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=IDS)
    with pytest.raises(CalibrationError, match="12 tokens are longer than the model's context of 8"):
        load_rows(CalibrationConfig(source=tmp_path / "a.npz"), None, vocab_size=60, context=8)
    rows = load_rows(CalibrationConfig(source=tmp_path / "a.npz", length=8), None, vocab_size=60, context=8)
    assert rows.input_ids.shape == (5, 8)
