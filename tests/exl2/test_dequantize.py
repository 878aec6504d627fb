"""`dequantize`: the same model in plain files, with the source's names and shapes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax import ConversionConfig, evaluate
from exl2jax.errors import NumericalError, SettingsError
from exl2jax.evaluation import model_logits
from exl2jax.exl2 import dequantize as module
from exl2jax.exl2.dequantize import dequantize_model
from exl2jax.models import HFModel, open_model

type Conversion = Callable[[Path, str], ConversionConfig]


@pytest.fixture(scope="module")
def untied(tiny_llama_untied: Path, tiny_conversion: Conversion) -> Path:
    """With biases, bfloat16 source, a head of its own."""
    return exl2_of(tiny_conversion(tiny_llama_untied, "fast"))


def exl2_of(config: ConversionConfig) -> Path:
    assert config.compile_full is not None
    return config.compile_full


def names_and_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    return {n: t.shape for path in directory.glob("*.safetensors") for n, t in load_file(path).items()}


def test_names_shapes_and_logits(untied: Path, tiny_llama_untied: Path, tmp_path: Path) -> None:
    size = dequantize_model(untied, tmp_path / "plain")
    assert names_and_shapes(tmp_path / "plain") == names_and_shapes(tiny_llama_untied)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
    assert size == sum(t.nbytes for t in tensors.values())
    assert isinstance(open_model(tmp_path / "plain"), HFModel)
    ids = np.random.default_rng(0).integers(3, 300, (3, 40)).astype(np.int32)
    assert np.array_equal(model_logits(tmp_path / "plain", ids), model_logits(untied, ids))
    found = evaluate(tmp_path / "plain", ids, untied)
    assert found.kl_divergence == 0 and found.top1_agreement == 1
    assert (tmp_path / "plain" / "tokenizer.json").read_bytes() == (untied / "tokenizer.json").read_bytes()


def test_a_tied_head_gets_a_tensor(tiny_llama: Path, tiny_conversion: Conversion, tmp_path: Path) -> None:
    directory = exl2_of(tiny_conversion(tiny_llama, "best"))
    dequantize_model(directory, tmp_path / "plain")
    found = names_and_shapes(tmp_path / "plain")
    assert found.pop("lm_head.weight") == found["model.embed_tokens.weight"]
    assert found == names_and_shapes(tiny_llama)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "quantization_config" not in config
    ids = np.random.default_rng(0).integers(3, 300, (2, 40)).astype(np.int32)
    assert np.array_equal(model_logits(tmp_path / "plain", ids), model_logits(directory, ids))


def test_shards_carry_an_index(untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    dequantize_model(untied, tmp_path / "plain")
    index = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert set(index["weight_map"]) == set(names_and_shapes(tmp_path / "plain"))
    ids = np.random.default_rng(0).integers(3, 300, (2, 40)).astype(np.int32)
    assert np.array_equal(model_logits(tmp_path / "plain", ids), model_logits(untied, ids))


def test_what_is_refused(untied: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds weights already"):
        dequantize_model(untied, untied)
    save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match=r"holds weights already \(model.safetensors\)"):
        dequantize_model(untied, tmp_path)
    with pytest.raises(NumericalError, match="norm: holds values beyond half precision"):
        module._half(np.float32([1e6]), "norm")
