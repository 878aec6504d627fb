"""A whole model in FP8 with block scales: converted, verified, and told apart from other ways of storing FP8."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax import ConversionConfig, convert, evaluate
from exl2jax.errors import ModelError, SettingsError
from exl2jax.exl2.verify.directory import verify
from exl2jax.models import module_specs, open_model
from exl2jax.storage import TensorFiles
from exl2jax.testing.made_up import made_up_measurement
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import VOCABULARY, tiny_tensors
from exl2jax.testing.tiny_model import write_directory

ARCHITECTURE = TINY["qwen3"]
BLOCK = (40, 48)
"""Divides none of the weights' sizes: the last block of every row and column of blocks is cut off."""

FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
    "modules_to_not_convert": ["lm_head"],
}

Tensors = dict[str, np.ndarray]


def in_blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight `[N, K]` in FP8, the factors of its blocks, and what the two mean together, block by block."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, BLOCK, strict=True))
    codes = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    scales, meant = np.empty((rows, columns), np.float32), np.empty(weight.shape, np.float32)
    for i in range(rows):
        for j in range(columns):
            part = np.s_[i * BLOCK[0] : (i + 1) * BLOCK[0], j * BLOCK[1] : (j + 1) * BLOCK[1]]
            scales[i, j] = np.abs(weight[part]).max() / 448
            codes[part] = (weight[part] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
            meant[part] = codes[part].astype(np.float32) * scales[i, j]
    return codes, scales, meant


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model twice: in FP8 with factors, and in float32."""
    stored, plain = Tensors(), Tensors()
    for name, tensor in tiny_tensors(ARCHITECTURE).items():
        stored[name] = plain[name] = tensor
        if name.endswith("_proj.weight"):
            stored[name], stored[f"{name}_scale_inv"], plain[name] = in_blocks(tensor.astype(np.float32))
    root = tmp_path_factory.mktemp("fp8")
    config = {"architectures": [ARCHITECTURE.architecture], **ARCHITECTURE.config, "torch_dtype": "bfloat16"}
    write_directory(root / "fp8", {**config, "quantization_config": FP8}, stored)
    write_directory(root / "plain", config, plain)
    return root / "fp8", root / "plain"


def settings(source: Path, root: Path, **options: Any) -> ConversionConfig:
    tokens = root / "rows.safetensors"
    save_file({"input_ids": np.random.default_rng(5).integers(0, VOCABULARY, (4, 32))}, tokens)
    return ConversionConfig(
        in_dir=source,
        out_dir=root / "work",
        compile_full=root / "exl2",
        cal_dataset=str(tokens),
        bits=4.5,
        dataset_rows=4,
        measurement_rows=4,
        preset="fast",
        **options,
    )


def test_weights_are_those_that_codes_and_factors_mean(pair: tuple[Path, Path]) -> None:
    fp8, plain = (open_model(path) for path in pair)
    for spec in module_specs(plain.config):
        for linear in spec.linears:
            ours, theirs = fp8.kernel(linear), plain.kernel(linear)
            assert ours.dtype == np.float32 and np.array_equal(ours, theirs), linear.key


def test_a_model_in_fp8_converts(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The result is sound, close to its source, and says nothing of FP8; whatever else the source said is there."""
    config = settings(pair[0], tmp_path, measurement=made_up_measurement(pair[0], tmp_path / "measurement.json"))
    convert(config)
    target = tmp_path / "exl2"
    assert verify(target).faults == ()
    assert not any("scale_inv" in name for name in load_file(target / "output.safetensors"))
    source, written = (json.loads((path / "config.json").read_text()) for path in (pair[0], target))
    assert source.pop("quantization_config") == FP8
    quantization = written.pop("quantization_config")
    assert quantization["quant_method"] == "exl2" and not FP8.keys() & (quantization.keys() - {"quant_method"})
    assert source.items() <= written.items()
    ids = np.random.default_rng(9).integers(0, VOCABULARY, (4, 32)).astype(np.int32)
    found = evaluate(target, ids, pair[1])
    assert found.kl_divergence is not None and found.kl_divergence < 1.0  # unrelated logits differ by about 4


def test_a_weight_without_its_factors_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source = shutil.copytree(pair[0], tmp_path / "source")
    (file,) = source.glob("*.safetensors")
    stored, lost = TensorFiles([file]), "model.layers.1.mlp.up_proj.weight_scale_inv"
    save_file({name: stored.read(name) for name in stored if name != lost}, file)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is F8_E4M3"):
        convert(settings(source, tmp_path))


def test_factors_of_another_shape_are_refused_by_the_headers(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source = shutil.copytree(pair[0], tmp_path / "source")
    (file,) = source.glob("*.safetensors")
    stored, cut = TensorFiles([file]), "model.layers.1.mlp.up_proj.weight_scale_inv"
    save_file({name: stored.read(name)[:-1] if name == cut else stored.read(name) for name in stored}, file)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale_inv has shape .* need"):
        open_model(source)


@pytest.mark.parametrize("block", [..., None, [128], [0, 128], "128x128"])
def test_factors_of_whole_tensors_are_refused(pair: tuple[Path, Path], tmp_path: Path, block: Any) -> None:
    source = shutil.copytree(pair[0], tmp_path / "source")
    path = source / "config.json"
    config = json.loads(path.read_text())
    if block is ...:
        del config["quantization_config"]["weight_block_size"]
    else:
        config["quantization_config"]["weight_block_size"] = block
    path.write_text(json.dumps(config))
    with pytest.raises(SettingsError, match="FP8 weights need a weight_block_size of two numbers"):
        convert(settings(source, tmp_path))
