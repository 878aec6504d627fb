"""The thirteen odd inputs beside the checkout: each is taken through the whole command, every pass included."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

from exl2jax import cli
from exl2jax.exl2.verify.directory import verify
from exl2jax.models import head_spec, load_exl2

ROWS = ["-c", "random", "-r", "2", "-mr", "2", "-l", "32", "-ml", "32"]
FLAGS = [*ROWS, "--preset", "fast", "-b", "4.3", "-hb", "6", "--pin", "*=4"]
"""Tiny rows, and one width for every linear, so that few programs are compiled."""

SAID = {
    "tied_but_stored_head": ("lm_head.weight is stored and differs from the embedding: it is the head",),
    "tied_equal_head": (),
    "beyond_half": ("model.layers.0.mlp: states or outputs of linears reach", "of the 65504 that half precision holds"),
    "slow_tokenizer": ("the source has no tokenizer.json: the result gets one",),
    "index_without_shards": ("model.safetensors.index.json is stale", "delete it"),
    "linked_tokenizer": ("links out of the model's directory are followed", "tokenizer.json ->"),
    "left_over_bitsandbytes": ("quantization_config (bitsandbytes) is ignored",),
    "empty_quantization_config": (),
    "more_layers_than_config": ("18 stored tensors are read by nothing, such as model.layers.2.",),
    "norms_nothing_reads": ("4 stored tensors are read by nothing, such as model.layers.0.self_attn.k_norm.weight",),
    "adapter_beside": ("adapter_model.safetensors: the adapter beside the model is not merged",),
}
"""The words that the warnings of a converted input must have; none where it needs no word."""

EVERY_MODEL = ("under-calibrated", "perplexity")
"""Words of warnings that random weights and tiny rows always cause."""


@pytest.fixture(scope="module")
def inputs(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("shared_odd_inputs", shared / "tools" / "odd_inputs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convert(model: Path, folder: Path) -> int:
    return cli.main(
        ["convert", "-i", str(model), "-o", str(folder / "work"), "-cf", str(folder / "exl2"), *FLAGS, "--json"]
    )


def test_every_input_has_a_test(inputs: ModuleType) -> None:
    assert set(inputs.EXPECTED) == {*SAID, "stale_index", "no_tokenizer_in_result"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_converted_with_the_words_that_it_needs(
    name: str, inputs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs.BUILDERS[name](tmp_path / name)
    assert convert(tmp_path / name, tmp_path) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    told = [line for line in warnings if not any(words in line for words in EVERY_MODEL)]
    assert len(told) == bool(SAID[name]), told
    assert all(words in told[0] for words in SAID[name])
    assert verify(tmp_path / "exl2").faults == ()
    assert not (tmp_path / "exl2" / "adapter_config.json").exists()
    head, scale = _stored_head(tmp_path / name), np.linalg.norm
    model = load_exl2(tmp_path / "exl2")
    assert scale(model.kernel(head_spec(model.config)).astype(np.float32).T - head) < 0.02 * scale(head)


def _stored_head(model: Path) -> np.ndarray:
    """The head that is stored, whatever the config says of it."""
    return load_file(model / "model.safetensors")["lm_head.weight"].astype(np.float32)


def test_a_stale_index_is_refused_with_both_names(
    inputs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs.BUILDERS["stale_index"](tmp_path / "model")
    for command in (["plan", str(tmp_path / "model"), *FLAGS], None):
        assert (cli.main(command) if command else convert(tmp_path / "model", tmp_path)) == 1
        said = capsys.readouterr().err
        assert "model.safetensors: stands beside model-00001-of-00002.safetensors" in said
        assert "model.safetensors.index.json" in said
    assert not (tmp_path / "work").exists() and not (tmp_path / "exl2").exists()


@pytest.mark.slow
def test_a_result_without_a_tokenizer_is_a_fault(inputs: ModuleType, tmp_path: Path) -> None:
    inputs.BUILDERS["empty_quantization_config"](tmp_path / "model")
    assert convert(tmp_path / "model", tmp_path) == 0
    (tmp_path / "exl2" / "tokenizer.json").unlink()
    (fault,) = verify(tmp_path / "exl2").faults
    assert "tokenizer.json" in f"{fault.tensor} {fault.message}"
