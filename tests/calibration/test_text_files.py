import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exl2jax.calibration import CalibrationConfig, Tokenizer, load_rows
from exl2jax.calibration.documents import BLOCK, json_file, json_lines, text_blocks
from exl2jax.calibration.packing import LONGEST_PIECE, pack_texts
from exl2jax.errors import CalibrationError
from tests.calibration.conftest import prose

type Write = Callable[[str, str | bytes], Path]

TEXTS = ["erste Zeile äé\n", "", "zweite\u2028Zeile", "третья шλ水 "]


def load(path: Path, tokenizer: Tokenizer, rows: int, length: int, **settings: object) -> np.ndarray:
    config = CalibrationConfig(source=path, rows=rows, length=length, **settings)  # pyright: ignore[reportArgumentType]
    return load_rows(config, tokenizer, vocab_size=tokenizer.vocab_size).input_ids


def expected(texts: list[str], tokenizer: Tokenizer, rows: int, length: int) -> np.ndarray:
    ids = [i for text in texts for i in tokenizer.encode(text).tolist()]
    return np.array(ids[: rows * length]).reshape(rows, length)


def test_a_text_file_is_one_running_text(write: Write, tokenizer: Tokenizer) -> None:
    text = prose(3, 400)
    path = write("a.txt", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    np.testing.assert_array_equal(load(path, tokenizer, 6, 50), expected([text], tokenizer, 6, 50))


def test_large_text_files_are_cut_between_lines_only(write: Write) -> None:
    text = prose(4, 1000) * (2 * BLOCK // len(prose(4, 1000)) + 1)
    blocks = list(text_blocks(write("a.txt", text)))
    assert len(blocks) > 2
    assert "".join(blocks) == text
    assert all(block.endswith("\n") for block in blocks)


def test_a_line_that_never_ends_is_cut_between_words(write: Write) -> None:
    text = prose(4, 1000).replace("\n", " ") * (3 * BLOCK // len(prose(4, 1000)))
    blocks = list(text_blocks(write("a.txt", text)))
    assert len(blocks) > 2
    assert "".join(blocks) == text
    assert all(block.startswith(" ") for block in blocks[1:])


def test_json_lines_longer_than_a_block_stay_whole(write: Write) -> None:
    texts = ["ab " * BLOCK, "c", "d\u2028e " * BLOCK]
    path = write("a.jsonl", "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts))
    assert list(json_lines(path, ())) == texts


def test_json_lines_and_json_hold_the_same_texts(write: Write, tokenizer: Tokenizer) -> None:
    records = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    wanted = expected(TEXTS, tokenizer, 2, 8)
    for path in (
        write("a.jsonl", lines),
        write("a.jsonl.gz", gzip.compress(lines.encode())),
        write("strings.jsonl", "\n".join(json.dumps(text) for text in TEXTS)),
        write("a.json", json.dumps(records)),
        write("strings.json", json.dumps(TEXTS)),
        write("columns.json", json.dumps({"text": TEXTS, "id": [0, 1, 2, 3]})),
        write("one.json", json.dumps({"text": "".join(TEXTS)})),
    ):
        ids = load(path, tokenizer, 2, 8)
        if path.name != "one.json":
            np.testing.assert_array_equal(ids, wanted)


def test_chosen_fields_are_joined_by_spaces(write: Write) -> None:
    path = write("a.jsonl", '{"title": "A", "body": "B", "text": "C"}\n')
    assert list(json_lines(path, ("body", "title"))) == ["B A"]
    assert list(json_file(write("a.json", '[{"title": "A", "body": "B"}]'), ("title", "body"))) == ["A B"]


def test_no_more_is_read_than_needed(tokenizer: Tokenizer) -> None:
    def texts():
        yield "abc " * 50
        raise AssertionError("read too far")

    pack_texts(texts(), tokenizer, domain="text", where="here", rows=1, length=8)


def test_huge_texts_are_cut_at_white_space(tokenizer: Tokenizer) -> None:
    word = "abcdefg "
    text = word * (2 * LONGEST_PIECE // len(word)) + "end"
    one = len(tokenizer.encode(" " + word.strip()))
    block = pack_texts([text], tokenizer, domain="text", where="here", rows=1, length=one * (LONGEST_PIECE // 8 + 50))
    assert tokenizer.decode(block.ids[0]).split() == ["abcdefg"] * (LONGEST_PIECE // 8 + 50)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "ab ab", r"a\.txt: \d tokens are there, 20 are needed for 2 rows of 10; ask for rows of at most"),
        ("a.txt", "", "0 tokens are there, 20 are needed .* holds no text"),
        ("a.txt", b"ab\xc3(" * 9, r"a\.txt: not valid UTF-8 at byte 2"),
        ("a.txt", b"x" * BLOCK + b"\xc3", rf"not valid UTF-8 at byte {BLOCK}"),
        ("a.txt.gz", b"not packed", r"a\.txt\.gz: not readable"),
        ("a.jsonl", '"abc"\n{"text": 1}\n', r"a\.jsonl, line 2: field 'text' holds a number, not text"),
        ("a.jsonl", '{"body": "b"}\n', r"line 1: no field 'text' \(it has 'body'\); choose one with `cal_columns`"),
        ("a.jsonl", "[1]\n", "line 1: holds a list"),
        ("a.jsonl", '{"text": \n', "line 1: not valid JSON"),
        ("a.json", "7", r"a\.json: holds a number; a list of strings"),
        ("a.json", '[{"text": null}]', "0 tokens are there"),
        ("a.json", "[" * 100_000, "not valid JSON"),
    ],
)
def test_files_that_do_not_serve(
    write: Write, tokenizer: Tokenizer, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        load(write(name, content), tokenizer, 2, 10)


def test_columns_of_different_lengths(write: Write) -> None:
    with pytest.raises(CalibrationError, match="different lengths"):
        list(json_file(write("a.json", '{"a": ["x"], "b": ["y", "z"]}'), ("a", "b")))


def test_a_missing_file_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.txt: no such calibration file"):
        load(tmp_path / "none.txt", tokenizer, 1, 1)
