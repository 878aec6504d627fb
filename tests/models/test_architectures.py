"""Every architecture through a whole conversion: it writes what the stock runtime looks up, and that means the same."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax import ConversionConfig, convert, evaluate
from exl2jax.evaluation import model_logits
from exl2jax.exl2.dequantize import dequantize_model
from exl2jax.exl2.verify.directory import verify
from exl2jax.models import HFModel, Model, module_specs, open_model
from exl2jax.models.architectures import ARCHITECTURES
from exl2jax.models.modules import MOE_KIND
from exl2jax.models.spelling import stock_spelling
from exl2jax.stream import blocks
from exl2jax.testing.made_up import made_up_measurement
from exl2jax.testing.stock_names import STOCK
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import VOCABULARY, write_tiny

ROWS, LENGTH = 16, 32
HALF_STEP = 2.0**-11
"""The relative error of rounding to half precision."""

COMPARED = ("phi3", "gpt2", "dbrx", "index")
"""Dequantized, these are run as well: for the others it is enough that all weights and settings are the same."""

MEASURED = ("gemma3", "gpt2", "qwen3_moe", "cohere")
"""Measured as well as quantized: one of every kind of module. The others take a measurement that is made up."""


IN_PIECES = ("dbrx",)
"""Converted with room for two of the four experts at a time."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "rows.safetensors"
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int64)
    save_file({"input_ids": ids}, path)
    return path


def test_every_architecture_is_here() -> None:
    assert {tiny.architecture for tiny in TINY.values()} | {"LlamaForCausalLM"} == set(ARCHITECTURES)
    assert set(STOCK) | {"LlamaForCausalLM"} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", TINY)
def test_conversion(name: str, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY[name]
    source = write_tiny(tmp_path / "source", tiny)
    if name in IN_PIECES:
        mixture = next(s for s in module_specs(open_model(source).config) if s.kind == MOE_KIND)
        monkeypatch.setattr(blocks, "EXPERT_BYTES", 2 * blocks.expert_bytes(mixture))
    target = tmp_path / "exl2"
    measurement = None if name in MEASURED else made_up_measurement(source, tmp_path / "measurement.json")
    result = convert(
        ConversionConfig(
            in_dir=source,
            out_dir=tmp_path / "work",
            compile_full=target,
            cal_dataset=str(tokens),
            bits=4.0,
            dataset_rows=ROWS,
            measurement_rows=4,
            preset="fast",
            measurement=measurement,
        )
    )
    assert result.bpw is not None and result.bpw <= 4.0
    report = verify(target)
    assert report.faults == ()
    written = load_file(target / "output.safetensors")
    check_names(tiny.architecture, tiny.layers, set(written))
    check_copies(tiny.architecture, source, written)
    check_config(tiny.architecture, source, target)
    check_weights(source, target)
    ids = np.random.default_rng(9).integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    found = evaluate(target, ids, source)
    assert found.kl_divergence is not None and found.kl_divergence < 1.0  # unrelated logits differ by about 4
    plain = tmp_path / "plain"
    dequantize_model(target, plain)
    check_plain(name, source, plain)
    check_same_model(target, plain)
    if name in COMPARED:
        ours, theirs = (model_logits(directory, ids[:4]) for directory in (target, plain))
        atol = 0.02 if tiny.dtype == "float32" else 1e-4  # half precision takes bfloat16 as it is
        np.testing.assert_allclose(theirs, ours, atol=atol)


def check_weights(source: Path, target: Path) -> None:
    """Each linear is its own source's: whatever the bits, it points the same way."""
    ours, theirs = open_model(source), open_model(target)
    for spec in module_specs(ours.config):
        for linear in spec.linears:
            pair = [model.kernel(linear).astype(np.float64).ravel() for model in (ours, theirs)]
            assert np.corrcoef(*pair)[0, 1] > 0.7, linear.key


def check_plain(name: str, source: Path, plain: Path) -> None:
    """The dequantized directory holds the source's tensors by name and shape, a tied head besides."""
    tiny = TINY[name]
    prefix = "transformer." if name == "gpt2" else ""  # published with and without; a head goes with the longer names
    written = load_file(plain / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {np.dtype(np.float16)}
    if tiny.head is None:
        head = written.pop(f"{ARCHITECTURES[tiny.architecture].prefix}lm_head.weight")
        assert head.shape == written[f"{prefix}{tiny.embedding}.weight"].shape
    assert {key: tensor.shape for key, tensor in written.items()} == {prefix + k: s for k, s in tiny.shapes().items()}
    for key in tiny.outer.keys() & written.keys() if ARCHITECTURES[tiny.architecture].copied else ():
        assert np.array_equal(written[key], load_file(source / "model.safetensors")[key].astype(np.float16)), key


def check_same_model(target: Path, plain: Path) -> None:
    """Both directories are the same settings and, but for float32 rounded to half precision, the same weights."""
    ours, theirs = open_model(target), open_model(plain)
    assert isinstance(theirs, HFModel)
    untied = replace(ours.config, tie_word_embeddings=False, scales=replace(ours.config.scales, norm_head=False))
    assert theirs.config == untied
    theirs.check_headers()
    for (name, value), (_, other) in zip(weights_of(ours), weights_of(theirs), strict=True):
        np.testing.assert_allclose(other, value, rtol=HALF_STEP, atol=2.0**-20, err_msg=name)


def weights_of(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Everything that the forward pass reads, as it reads it."""
    yield "embedding", model.embedding()
    positions = model.positions(LENGTH)
    if positions is not None:
        yield "positions", positions
    modules = {spec.key: model.module_params(spec) for spec in module_specs(model.config)}
    for key, params in (modules | {"head": model.head_params()}).items():
        for name, parts in params.items():
            yield from ((f"{key}.{name}.{part}", value) for part, value in parts.items())


def check_names(architecture: str, layers: int, written: set[str]) -> None:
    stock = STOCK[architecture]
    copied = {name for name in written if stock.copied and name.startswith(stock.copied)}
    assert written - copied == stock.of(layers)
    assert bool(copied) == bool(stock.copied)


def check_copies(architecture: str, source: Path, written: dict[str, np.ndarray]) -> None:
    """Whatever is not quantized stands there as in the source, to the bit; biases in half precision."""
    model = open_model(source)
    for name, tensor in written.items():
        if name.rpartition(".")[2].startswith("q_"):
            continue
        original = model.files.read(name)
        if name.removesuffix(".bias") in {key.rpartition(".")[0] for key in written if key.endswith("q_weight")}:
            assert tensor.dtype == np.float16, name
            padded = np.pad(original.astype(np.float16), (0, len(tensor) - len(original)))
            assert np.array_equal(tensor, padded), name
        else:
            assert tensor.dtype == original.dtype and tensor.tobytes() == original.tobytes(), name


def check_config(architecture: str, source: Path, target: Path) -> None:
    """The source's config to the letter where stock reads it, keys that stock misses added, none taken away."""
    original = json.loads((source / "config.json").read_text())
    config = json.loads((target / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "exl2"
    assert config == stock_spelling(original, ARCHITECTURES[architecture])
    assert original.items() <= config.items()
