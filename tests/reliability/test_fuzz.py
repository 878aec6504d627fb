"""A bounded run of the fuzzing; `make torture` reads a hundred thousand files. Found cases stand below for good."""

import json
from pathlib import Path

import pytest

from exl2jax.calibration import load_tokenizer
from exl2jax.errors import Exl2JaxError, ModelError
from exl2jax.models import read_config
from exl2jax.storage import TensorFiles
from tests.reliability.fuzzing import CASES, GIGABYTE, Target, limited, peak_memory, run_target, targets
from tests.support.tiny_model import write_tiny_llama

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
