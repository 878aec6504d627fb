from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2jax.calibration import CalibrationConfig, CalibrationRows, Tokenizer, load_rows, prepare_dataset
from exl2jax.errors import CalibrationError, SettingsError


def load(examples: object, tokenizer: Tokenizer | None = None, **settings: object) -> CalibrationRows:
    config = CalibrationConfig(source=examples, **settings)  # pyright: ignore[reportArgumentType]
    return load_rows(config, tokenizer, vocab_size=500, context=64)


def real(rows: CalibrationRows) -> list[list[int]]:
    if rows.attention_mask is None:
        return rows.input_ids.tolist()
    return [ids[mask == 1].tolist() for ids, mask in zip(rows.input_ids, rows.attention_mask, strict=True)]


def test_texts_are_encoded_as_a_transformers_tokenizer_does(template_tokenizer: Tokenizer) -> None:
    texts = ["abc", "äé shλ水", "a"]
    rows = load(texts, template_tokenizer)
    assert real(rows) == [[0, *template_tokenizer.encode(text).tolist()] for text in texts]
    assert rows.domains == ("examples",) * 3
    assert rows.source == "examples"


@settings(deadline=None)
@given(lists=st.lists(st.lists(st.integers(0, 499), min_size=1, max_size=12), min_size=1, max_size=6))
def test_token_lists_are_kept_and_padded_at_the_end(lists: list[list[int]]) -> None:
    rows = load(lists)
    assert real(rows) == lists
    assert rows.input_ids.shape == (len(lists), max(map(len, lists)))
    assert (rows.attention_mask is None) == (len(set(map(len, lists))) == 1)
    if rows.attention_mask is not None:
        assert (np.diff(rows.attention_mask, axis=1) <= 0).all()


def test_tokenizer_outputs_and_optimum_batches_lose_their_padding() -> None:
    examples = [
        {"input_ids": [4, 5, 6], "attention_mask": [1, 1, 1]},
        {"input_ids": np.array([[1, 2, 3, 4, 5]]), "attention_mask": np.array([[1, 1, 1, 1, 1]])},
    ]
    assert real(load(examples)) == [[4, 5, 6], [1, 2, 3, 4, 5]]
    batched = prepare_dataset(examples, batch_size=2, pad_token_id=9)
    assert real(load(batched)) == [[4, 5, 6], [1, 2, 3, 4, 5]]
    assert real(load([{"input_ids": [7, 8]}])) == [[7, 8]]


def test_arrays_are_ready_rows() -> None:
    array = np.arange(24).reshape(3, 8)
    assert load(array).input_ids.tolist() == array.tolist()
    assert load(array, rows=2, length=5).input_ids.tolist() == array[:2, :5].tolist()
    assert load(list(array)).input_ids.tolist() == array.tolist()


def test_long_examples_are_cut_to_the_length_or_the_context() -> None:
    rows = load([list(range(10)), list(range(20))], length=12)
    assert real(rows) == [list(range(10)), list(range(12))]
    assert rows.notes == ("1 of 2 examples were cut to 12 tokens",)
    assert load([list(range(100))]).input_ids.shape == (1, 64)


def test_padding_ids_change_nothing_that_counts() -> None:
    lists = [[1, 2, 3], [4]]
    first, second = load(lists, pad_token_id=7), load(lists, pad_token_id=10_000)
    assert first.input_ids[1].tolist() == [4, 7, 7]
    assert second.input_ids[1].tolist() == [4, 0, 0]
    assert real(first) == real(second) == lists


def test_prepare_dataset_pads_each_batch_at_the_start() -> None:
    examples = [{"input_ids": [[1] * n], "attention_mask": [[1] * n]} for n in (2, 4, 3)]
    batches = prepare_dataset(examples, batch_size=2, pad_token_id=9)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[9, 9, 1, 1], [1, 1, 1, 1]], [[1, 1, 1]]]
    assert batches[0]["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batches[0]["input_ids"].dtype == np.int64
    assert [batch["input_ids"].shape for batch in prepare_dataset(examples)] == [(1, 2), (1, 4), (1, 3)]


def test_batches_need_a_padding_id() -> None:
    with pytest.raises(SettingsError, match="batch_size of 2 needs a pad_token_id"):
        prepare_dataset([{"input_ids": [1], "attention_mask": [1]}], batch_size=2)
    with pytest.raises(SettingsError, match="pad_token_id"):
        load([[1, 2]], batch_size=2)


@pytest.mark.parametrize(
    ("examples", "settings", "message"),
    [
        ([], {}, "the list is empty"),
        ([[1, 2], []], {}, "entry 1: .* no tokens|entry 1: holds float64"),
        ([[1, 2]], {"rows": 2}, "1 are there, 2 rows are needed"),
        ([[1.5]], {}, "entry 0: holds float64, not token ids"),
        ([[[1, 2], [3]]], {}, "entry 0: is ragged"),
        ([[[1, 2], [3, 4]]], {}, "entry 0: .* not a flat list"),
        ([{"ids": [1]}], {}, "entry 0: has no 'input_ids'"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], {}, "they must agree"),
        (["text"], {}, "there is no tokenizer"),
        ([[1, 500]], {}, "token id 500 at row 0, position 1"),
        ([[1, -1]], {}, "token id -1"),
        (np.zeros((2, 3)), {}, "input_ids is float64"),
    ],
)
def test_examples_that_do_not_serve(examples: object, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load(examples, **settings)


def test_an_empty_text_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match="entry 1: holds no tokens"):
        load(["abc", ""], tokenizer)
