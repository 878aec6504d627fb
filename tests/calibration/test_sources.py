"""The notation of sources, mixtures, sampling from the model, and the checks that every source passes."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from exl2jax.calibration import CalibrationConfig, Tokenizer, load_rows, load_tokenizer, summarize
from exl2jax.calibration.prompts import PROMPTS
from exl2jax.calibration.source import Source, parse_source
from exl2jax.errors import CalibrationError, SettingsError
from tests.calibration.conftest import prose


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("standard", [("standard", "", None)]),
        ("standard:60", [("standard", "", 60)]),
        ("standard:some/dir", [("standard", "some/dir", None)]),
        ("standard:some/dir:7", [("standard", "some/dir", 7)]),
        ("self", [("self", "", None)]),
        ("random:3", [("random", "", 3)]),
        ("c4-new", [("named", "c4-new", None)]),
        ("a.parquet", [("parquet", "a.parquet", None)]),
        ("dir.x/A.TXT", [("text", "dir.x/A.TXT", None)]),
        ("a.jsonl.gz", [("jsonl", "a.jsonl.gz", None)]),
        ("a.json", [("json", "a.json", None)]),
        ("a.npz:9", [("ready", "a.npz", 9)]),
        ("standard:60, wikitext2:40", [("standard", "", 60), ("named", "wikitext2", 40)]),
    ],
)
def test_notation(text: str, expected: list[tuple[str, str, int | None]]) -> None:
    assert [(s.kind, s.name, s.count) for s in parse_source(text)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wikitext3", "unknown calibration source 'wikitext3'; known are standard, .*wikitext2, c4, c4-new, self"),
        ("", "unknown calibration source ''"),
        ("standard:", "unknown calibration source"),
        ("ptb", "'ptb' is not supported"),
        ("standard,wikitext2:40", "'standard' has no row count; write standard:COUNT"),
        ("standard:0", "at least 1"),
        ("standard:5,", "unknown calibration source ''"),
    ],
)
def test_notation_that_says_nothing(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_source(text)


def test_a_file_that_exists_is_taken_by_its_whole_name(tmp_path: Path) -> None:
    path = tmp_path / "a,b:3.txt"
    path.write_text("text")
    assert parse_source(str(path)) == (Source(kind="text", name=str(path)),)


def test_a_mixture_keeps_order_and_counts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(7, 500))
    ids = np.arange(200).reshape(5, 40)
    mask = (np.arange(40) < np.array([40, 40, 9, 40, 40])[:, None]).astype(np.int64)
    np.savez(tmp_path / "a.npz", input_ids=ids, attention_mask=mask)
    config = CalibrationConfig(source=f"{tmp_path}/a.txt:6,random:2,{tmp_path}/a.npz:4", length=30)
    rows = load_rows(config, tokenizer, vocab_size=500)
    assert rows.domains == ("text",) * 6 + ("random",) * 2 + ("tokens",) * 4
    assert rows.attention_mask is not None
    np.testing.assert_array_equal(rows.attention_mask, np.concatenate([np.ones((8, 30)), mask[:4, :30]]))
    np.testing.assert_array_equal(rows.input_ids[8:], ids[:4, :30])
    shared = load_rows(CalibrationConfig(source=config.source, length=30, rows=6), tokenizer, vocab_size=500)
    assert shared.composition == {"text": 3, "random": 1, "tokens": 2}
    measured = load_rows(CalibrationConfig(source=config.source, length=30, measure=True), tokenizer, vocab_size=500)
    assert measured.composition == {"text": 1, "random": 1, "tokens": 1}


def test_defaults_without_a_size(tokenizer: Tokenizer) -> None:
    for measure, rows in ((False, 100), (True, 16)):
        config = CalibrationConfig(source="random", measure=measure)
        assert load_rows(config, tokenizer, vocab_size=500).input_ids.shape == (rows, 2048)
        assert load_rows(config, tokenizer, vocab_size=500, context=64).input_ids.shape == (rows, 64)


def test_random_ids_stay_inside_the_embedding(tokenizer: Tokenizer) -> None:
    rows = load_rows(CalibrationConfig(source="random", rows=4, length=500), tokenizer, vocab_size=50)
    assert rows.input_ids.max() == 49
    assert rows.input_ids.min() == 0


class Recorder:
    """A sampler that goes on from each prompt by counting, and notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[list[int]], int, int, int]] = []

    def __call__(self, prompts: Sequence[Sequence[int]], n_rows: int, length: int, seed: int) -> np.ndarray:
        self.calls.append(([list(p) for p in prompts], n_rows, length, seed))
        rows = [[*prompt, *((i + r) % 300 for i in range(length))][:length] for r, prompt in enumerate(prompts)]
        return np.array(rows)


def test_self_asks_the_model_from_bos_and_from_prompts(tokenizer: Tokenizer) -> None:
    sampler = Recorder()
    config = CalibrationConfig(source="self", rows=30, length=90, seed=4)
    rows = load_rows(config, tokenizer, vocab_size=500, sampler=sampler)
    [(prompts, n_rows, length, seed)] = sampler.calls
    assert (len(prompts), n_rows, length) == (30, 30, 90)
    assert prompts[0::2] == [[0]] * 15
    known: dict[tuple[int, ...], str] = {
        (0, *tokenizer.encode(text).tolist()): domain for domain, texts in PROMPTS.items() for text in texts
    }
    assert [known[tuple(prompt)] for prompt in prompts[1:12:2]] == list(PROMPTS)
    assert rows.domains == ("self",) * 30
    for row, prompt in zip(rows.input_ids.tolist(), prompts, strict=True):
        assert row[: len(prompt)] == prompt
    load_rows(config, tokenizer, vocab_size=500, sampler=sampler)
    load_rows(CalibrationConfig(source="self", rows=30, length=90, seed=5), tokenizer, vocab_size=500, sampler=sampler)
    assert sampler.calls[1][3] == seed != sampler.calls[2][3]


def test_self_without_bos_asks_from_prompts_only(tokenizer_dirs: dict[str, Path]) -> None:
    sampler = Recorder()
    config = CalibrationConfig(source="self", rows=8, length=4)
    load_rows(config, load_tokenizer(tokenizer_dirs["no-bos"]), vocab_size=500, sampler=sampler)
    assert all(1 <= len(prompt) <= 4 for prompt in sampler.calls[0][0])


def test_self_needs_a_sampler_that_keeps_its_word(tokenizer: Tokenizer) -> None:
    config = CalibrationConfig(source="self", rows=2, length=4)
    with pytest.raises(SettingsError, match="sampler"):
        load_rows(config, tokenizer, vocab_size=500)
    with pytest.raises(CalibrationError, match=r"the sampler gave int64 \[2, 3\], not integers \[2, 4\]"):
        load_rows(config, tokenizer, vocab_size=500, sampler=lambda *_: np.zeros((2, 3), np.int64))


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": 0},
        {"length": 0},
        {"seed": -1},
        {"noise_rows": -1},
        {"batch_size": 0},
        {"split": "test"},
        {"pad_token_id": -1},
    ],
)
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(settings))):
        CalibrationConfig(**settings)  # pyright: ignore[reportArgumentType]


def test_a_length_beyond_the_context_is_refused_first(tokenizer: Tokenizer) -> None:
    config = CalibrationConfig(source="no-such-source", length=100)
    with pytest.raises(CalibrationError, match="rows of 100 tokens are longer than the model's context of 64"):
        load_rows(config, tokenizer, vocab_size=500, context=64)


def test_a_tokenizer_of_another_model_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(7, 500))
    with pytest.raises(CalibrationError, match="outside the model's vocabulary of 50; use the tokenizer that belongs"):
        load_rows(CalibrationConfig(source=tmp_path / "a.txt", rows=2, length=20), tokenizer, vocab_size=50)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(SettingsError, match="needs the model's tokenizer"):
        load_rows(CalibrationConfig(rows=8, length=20), None, vocab_size=50)


def test_parts_of_different_lengths_are_refused(tmp_path: Path) -> None:
    for name, length in (("a", 4), ("b", 6)):
        np.savez(tmp_path / f"{name}.npz", input_ids=np.arange(2 * length).reshape(2, length))
    source = f"{tmp_path}/a.npz:2,{tmp_path}/b.npz:2"
    with pytest.raises(CalibrationError, match=r"rows of \[4, 6\] tokens; set the length to 4"):
        load_rows(CalibrationConfig(source=source), None, vocab_size=50)
    assert load_rows(CalibrationConfig(source=source, length=4), None, vocab_size=50).input_ids.shape == (4, 4)


def test_record_and_summary_tell_what_was_built(tokenizer: Tokenizer) -> None:
    ids = np.array([[3, 4, 5, 6], [7, 3, 9, 9], [3, 4, 5, 6]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    examples = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    rows = load_rows(CalibrationConfig(source=examples, seed=8), tokenizer, vocab_size=500)
    record = rows.record()
    assert record["tokenizer"] == tokenizer.fingerprint
    assert (record["rows"], record["length"], record["seed"]) == (3, 4, 8)
    assert record["composition"] == {"examples": 3}
    assert len(record["sha256"]) == 64
    assert record["notes"] == ["1 of 3 rows repeat an earlier row"]
    summary = summarize(rows, tokenizer, vocab_size=500)
    assert (summary.tokens, summary.vocabulary_used, summary.duplicates) == (10, 5, 1)
    assert summary.coverage == 0.01
    assert summary.first == summary.last == tokenizer.decode([3, 4, 5, 6])
    assert summary.record()["coverage"] == 0.01
    assert summarize(rows, None, vocab_size=500).first == ""


def test_the_hash_is_that_of_the_ids(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.array([[1, 2], [3, 258]]))
    rows = load_rows(CalibrationConfig(source=tmp_path / "a.npz"), None, vocab_size=300)
    assert rows.sha256 == sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 2, 1, 0, 0])).hexdigest()
