"""The named sets against an oracle of Optimum's rules, on a stand-in for the `datasets` library and on local files."""

import gzip
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exl2jax.calibration import CalibrationConfig, Tokenizer, get_dataset, load_rows
from exl2jax.errors import CalibrationError, SettingsError
from tests.calibration.conftest import prose

WIKI_LINES = [line + "\n" if line else "" for line in prose(5, 9000).replace("a ", "\n\n").split("\n")][:1200]
C4_TEXTS = [prose(200 + i, 5 + 7 * (i % 13)) for i in range(40)]


class FakeDataset:
    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": self.texts[index]}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Put a stand-in for `datasets` in place; returns what is asked of it."""
    calls: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None = None, *, split: str, data_files: object = None) -> FakeDataset:
        calls.append((name, config, split, data_files))
        return FakeDataset(WIKI_LINES if name == "wikitext" else C4_TEXTS)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def wikitext_oracle(tokenizer: Tokenizer, nsamples: int, seqlen: int, seed: int) -> list[list[int]]:
    random.seed(seed)
    ids = tokenizer.encode("".join([" \n" if s == "" else s for s in WIKI_LINES[:1000]]), template=True).tolist()
    starts = [random.randint(0, len(ids) - seqlen - 1) for _ in range(nsamples)]
    return [ids[i : i + seqlen] for i in starts]


def c4_oracle(tokenizer: Tokenizer, nsamples: int, seqlen: int, seed: int) -> list[list[int]]:
    random.seed(seed)
    samples = []
    for _ in range(nsamples):
        while True:
            ids = tokenizer.encode(C4_TEXTS[random.randint(0, len(C4_TEXTS) - 1)], template=True).tolist()
            if len(ids) >= seqlen:
                break
        start = random.randint(0, len(ids) - seqlen - 1)
        samples.append(ids[start : start + seqlen])
    return samples


def samples(name: str, tokenizer: Tokenizer, split: str = "train", cal_dir: Path | None = None) -> list[list[int]]:
    found = get_dataset(name, tokenizer, nsamples=12, seqlen=50, seed=3, split=split, cal_dir=cal_dir)
    assert all(sample["input_ids"].shape == sample["attention_mask"].shape == (1, 50) for sample in found)
    assert all((sample["attention_mask"] == 1).all() for sample in found)
    return [sample["input_ids"][0].tolist() for sample in found]


def test_wikitext2_asks_for_the_right_set_and_draws_the_same_windows(
    asked: list[tuple[object, ...]], template_tokenizer: Tokenizer
) -> None:
    assert samples("wikitext2", template_tokenizer) == wikitext_oracle(template_tokenizer, 12, 50, 3)
    samples("wikitext2", template_tokenizer, split="validation")
    assert asked == [
        ("wikitext", "wikitext-2-raw-v1", "train", None),
        ("wikitext", "wikitext-2-raw-v1", "test", None),
    ]


@pytest.mark.parametrize("name", ["c4", "c4-new"])
def test_c4_asks_for_the_right_files_and_draws_the_same_windows(
    asked: list[tuple[object, ...]], template_tokenizer: Tokenizer, name: str
) -> None:
    assert samples(name, template_tokenizer) == c4_oracle(template_tokenizer, 12, 50, 3)
    samples(name, template_tokenizer, split="validation")
    assert asked == [
        ("allenai/c4", None, "train", {"train": "en/c4-train.00000-of-01024.json.gz"}),
        ("allenai/c4", None, "validation", {"validation": "en/c4-validation.00000-of-00008.json.gz"}),
    ]


def test_local_copies_stand_in(template_tokenizer: Tokenizer, tmp_path: Path) -> None:
    wikitext, c4 = wikitext_oracle(template_tokenizer, 12, 50, 3), c4_oracle(template_tokenizer, 12, 50, 3)
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "wiki.train.raw").write_text("".join(line or " \n" for line in WIKI_LINES), encoding="utf-8")
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in C4_TEXTS)
    (raw / "c4-train.00000-of-01024.json").write_text(lines, encoding="utf-8")
    assert samples("wikitext2", template_tokenizer, cal_dir=raw) == wikitext
    assert samples("c4", template_tokenizer, cal_dir=raw) == c4

    hub = tmp_path / "hub"
    (hub / "wikitext-2-raw-v1").mkdir(parents=True)
    (hub / "en").mkdir()
    shard = hub / "wikitext-2-raw-v1" / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"text": WIKI_LINES}), shard, row_group_size=500)
    (hub / "en" / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(lines.encode()))
    assert samples("wikitext2", template_tokenizer, cal_dir=hub) == wikitext
    assert samples("c4-new", template_tokenizer, cal_dir=hub) == c4


def test_as_a_source(asked: list[tuple[object, ...]], template_tokenizer: Tokenizer) -> None:
    config = CalibrationConfig(source="wikitext2:7", length=50, seed=3)
    rows = load_rows(config, template_tokenizer, vocab_size=500)
    assert rows.input_ids.tolist() == wikitext_oracle(template_tokenizer, 7, 50, 3)
    assert rows.domains == ("wikitext2",) * 7
    assert asked


def test_a_document_of_exactly_the_length_is_taken_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = tokenizer.encode("abc def ghi", template=True).tolist()
    (tmp_path / "c4-train.00000-of-01024.json").write_text('{"text": "a"}\n\n{"text": "abc def ghi"}\n')
    found = get_dataset("c4", tokenizer, nsamples=2, seqlen=len(ids), cal_dir=tmp_path)
    assert [sample["input_ids"][0].tolist() for sample in found] == [ids, ids]
    config = CalibrationConfig(source="c4", rows=2, length=len(ids), cal_dir=tmp_path)
    assert "1 of 2 rows repeat an earlier row" in load_rows(config, tokenizer, vocab_size=500).notes


def test_the_last_token_of_a_text_is_never_reached(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Optimum's upper bound leaves out the last window."""
    (tmp_path / "c4-train.00000-of-01024.json").write_text('{"text": "abc def ghi"}\n')
    ids = tokenizer.encode("abc def ghi", template=True).tolist()
    found = get_dataset("c4", tokenizer, nsamples=20, seqlen=len(ids) - 1, cal_dir=tmp_path)
    assert all(sample["input_ids"][0].tolist() == ids[:-1] for sample in found)


def test_sets_that_are_too_short(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "c4-train.00000-of-01024.json").write_text('{"text": "abc"}\n')
    (tmp_path / "wiki.train.raw").write_text(" = abc = \n")
    with pytest.raises(CalibrationError, match="none of its 1 documents has 99 tokens"):
        get_dataset("c4", tokenizer, 1, 99, cal_dir=tmp_path)
    with pytest.raises(CalibrationError, match=r"wikitext2: its first 1000 lines are \d+ tokens, 99 are needed"):
        get_dataset("wikitext2", tokenizer, 1, 99, cal_dir=tmp_path)


def test_unknown_names_and_splits(tokenizer: Tokenizer) -> None:
    for name, message in (("ptb", "is refused"), ("ptb-new", "is refused"), ("c5", "is unknown; known are wikitext2")):
        with pytest.raises(SettingsError, match=message):
            get_dataset(name, tokenizer)
    with pytest.raises(SettingsError, match="split is 'test'"):
        get_dataset("c4", tokenizer, split="test")


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install 'exl2jax\[datasets\]', or download .* `cal_dir`"):
        get_dataset("wikitext2", tokenizer)


def test_without_a_network_the_error_says_what_to_download(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(CalibrationError, match=r"c4: could not be loaded \(no route\); connect .* `cal_dir`"):
        get_dataset("c4", tokenizer)


def test_local_copies_that_do_not_serve(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no local copy of c4; put one of en/c4-train\.00000"):
        get_dataset("c4", tokenizer, cal_dir=tmp_path)
    packed = tmp_path / "c4-train.00000-of-01024.json.gz"
    packed.write_bytes(gzip.compress(b'{"text": "abc"}\n')[:-5])
    with pytest.raises(CalibrationError, match="not readable"):
        get_dataset("c4", tokenizer, cal_dir=tmp_path)
    packed.write_bytes(gzip.compress(b"\n\n"))
    with pytest.raises(CalibrationError, match="has no lines"):
        get_dataset("c4", tokenizer, cal_dir=tmp_path)
    packed.write_bytes(gzip.compress(b'{"text": "\xff"}\n'))
    with pytest.raises(CalibrationError, match="document 0: not valid UTF-8"):
        get_dataset("c4", tokenizer, cal_dir=tmp_path)
    (tmp_path / "wiki.train.raw").write_bytes(b"\xff\n")
    with pytest.raises(CalibrationError, match="not readable as UTF-8"):
        get_dataset("wikitext2", tokenizer, cal_dir=tmp_path)


def test_the_global_random_state_is_left_alone(template_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "wiki.train.raw").write_text("".join(line or " \n" for line in WIKI_LINES), encoding="utf-8")
    random.seed(99)
    before = random.getstate()
    get_dataset("wikitext2", template_tokenizer, 3, 20, cal_dir=tmp_path)
    assert random.getstate() == before
    assert np.ndim(before[1]) == 1
