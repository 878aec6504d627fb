"""A bounded run of the fuzzing; `make torture` reads a hundred thousand files. Found cases stand below for good."""

import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exl2jax.calibration import load_tokenizer
from exl2jax.calibration.parquet import parquet_texts
from exl2jax.calibration.ready import read_ready
from exl2jax.conversion.settings import resumed_config
from exl2jax.errors import CalibrationError, Exl2JaxError, JobError, ModelError
from exl2jax.exl2.compile import copy_source_files
from exl2jax.models import read_config
from exl2jax.storage import TensorFiles
from exl2jax.testing.tiny_model import write_tiny_llama
from tests.reliability.fuzzing import CASES, GIGABYTE, Target, limited, peak_memory, run_target, targets

BOUNDED = 1500
"""Cases of the run, shared out as in the full one."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "home"


@pytest.fixture(scope="module")
def every(home: Path) -> list[Target]:
    return targets(home)


@pytest.mark.parametrize("index", range(14))
def test_damaged_files_give_a_result_or_an_error_of_ours(home: Path, every: list[Target], index: int) -> None:
    assert len(every) == 14 and CASES >= 100_000
    target = every[index]
    before = peak_memory()
    assert run_target(target, home, max(20, round(BOUNDED * target.share / sum(t.share for t in every)))) > 0
    assert peak_memory() - before < GIGABYTE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 2**31),  # the list of modules grew until memory was gone
        ("num_hidden_layers", 10**400),
        ("rope_theta", 10**400),  # an integer that no float holds
        ("vocab_size", 10**400),
    ],
    ids=["many layers", "endless layers", "endless theta", "endless vocabulary"],
)
def test_sizes_that_no_model_has(tmp_path: Path, key: str, value: int) -> None:
    model = write_tiny_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
    with limited(), pytest.raises(ModelError, match=f"{key}|config.json: .* beyond double precision"):
        read_config(model)


@pytest.mark.parametrize("name", ["\0", "\x1b[2J", "a\nb.safetensors"])
def test_an_index_that_names_what_cannot_be_shown(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(ModelError, match="files of the same directory") as caught:
        TensorFiles.of_source(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("depth", [65, 500, 900, 10**5])
def test_json_nested_without_end(tmp_path: Path, depth: int) -> None:
    model = write_tiny_llama(tmp_path / "model")
    text = (model / "config.json").read_text(encoding="utf-8").rstrip().removesuffix("}")
    (model / "config.json").write_text(text + ', "deep": ' + "[" * depth + "]" * depth + "}", encoding="utf-8")
    with pytest.raises(Exl2JaxError, match=r"config\.json"):
        read_config(model)


@pytest.mark.parametrize("content", ['{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', '{"a": -Infinity}'])
def test_json_that_could_not_be_written_back(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json: the model's configuration cannot be read"):
        read_config(tmp_path)


def test_a_tokenizer_that_needs_code(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own), encoding="utf-8")
    (tmp_path / "own.py").write_text("raise SystemExit('this code must not run')", encoding="utf-8")
    with pytest.raises(ModelError, match=r"needs code of the model's own \(auto_map\), which is never run"):
        load_tokenizer(tmp_path)


def test_a_file_larger_than_json_may_be(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**34)  # sparse: nothing is on disk, and nothing may be read
    with limited(2), pytest.raises(ModelError, match=r"more than the .* that are read"):
        read_config(tmp_path)


def test_messages_spell_out_what_cannot_be_shown() -> None:
    assert (
        str(ModelError("architecture \0 and \x1b[2J and é\nnext line"))
        == "architecture \\x00 and \\x1b[2J and é\nnext line"
    )


def test_an_index_that_names_what_no_file_can_be_called(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "é" * 300}}), encoding="utf-8"
    )
    with pytest.raises(ModelError, match="files of the same directory"):
        TensorFiles.of_source(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"in_dir": "model"}, {"in_dir": 3, "compile_full": None}])
def test_a_job_without_its_settings(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="does not hold the settings of a job"):
        resumed_config(tmp_path, settings, {})


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"words": ["some text"] * 5}), sink, compression="none", store_schema=False)
    return sink.getvalue()


def test_a_column_whose_name_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes().replace(b"words", b"wo\x80ds"))
    with pytest.raises(CalibrationError, match="not a readable Parquet file"):
        list(parquet_texts(tmp_path / "a.parquet", ()))


def test_a_parquet_file_whose_columns_lie_elsewhere(tmp_path: Path) -> None:
    """A column chunk may name another file; nothing outside of the one that was given is opened."""
    secret = tmp_path / "secret.parquet"
    secret.write_bytes(parquet_bytes())
    inside = tmp_path / "model" / "index.parquet"
    inside.parent.mkdir()
    metadata = pq.ParquetFile(secret).metadata
    metadata.set_file_path("../secret.parquet")
    metadata.write_metadata_file(inside)
    with pytest.raises(CalibrationError, match=r"index\.parquet"):
        list(parquet_texts(inside, ()))


def archive(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("input_ids.npy", content)
    return path


def npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def test_an_array_that_promises_more_than_it_holds(tmp_path: Path) -> None:
    sound = npy(np.zeros((2, 4), np.int32))
    assert read_ready(archive(tmp_path / "a.npz", sound), rows=None, length=None).ids.shape == (2, 4)
    liar = sound.replace(b"(2, 4)", b"(9999999999, 9999)")[: len(sound)]
    with limited(), pytest.raises(CalibrationError, match=r"b\.npz: not a readable npz file"):
        read_ready(archive(tmp_path / "b.npz", liar), rows=None, length=None)


def test_an_array_that_unpacks_without_end(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.npz", npy(np.zeros((2, 4), np.int32)))
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + 24  # the unpacked size in the central directory
    content[at : at + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    with limited(), pytest.raises(CalibrationError, match="unpacks to 2147483648 bytes"):
        read_ready(path, rows=None, length=None)


def test_a_tokenizer_beyond_reason(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**34)  # sparse
    with limited(2), pytest.raises(ModelError, match=r"more than the .* that a tokenizer may have"):
        load_tokenizer(tmp_path)


def copied(directory: Path, target: Path) -> set[str]:
    """Names of the files that a compilation copies out of a model's directory."""
    target.mkdir()
    copy_source_files(SimpleNamespace(directory=directory, stock_config=dict), target, {})  # type: ignore[arg-type]
    return {path.name for path in target.iterdir()}


def test_links_are_followed_to_regular_files_of_known_names_only(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("{}", encoding="utf-8")
    model = tmp_path / "model"
    model.mkdir()
    (model / "notes.txt").symlink_to(tmp_path / "elsewhere")
    (model / "generation_config.json").symlink_to(tmp_path / "elsewhere")
    assert copied(model, tmp_path / "out") == {"generation_config.json", "config.json"}
    (model / "tokenizer.model").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=r"tokenizer\.model \(a link to /dev/zero\): is no file"):
        copied(model, tmp_path / "other")


def test_the_links_of_the_hub_cache_are(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "ab12").write_text("{}", encoding="utf-8")
    (snapshot / "tokenizer.json").symlink_to(Path("../../blobs/ab12"))
    assert copied(snapshot, tmp_path / "out") == {"tokenizer.json", "config.json"}
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
