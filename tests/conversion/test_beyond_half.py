"""States beyond half precision: they are recorded, and told where ExLlamaV2 would hold them in half precision."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax import ConversionConfig, convert
from exl2jax.evaluation.logits import final_states
from exl2jax.exl2.verify.directory import verify
from exl2jax.models import load_exl2
from exl2jax.ops.rounding import HALF_MAX
from exl2jax.testing.made_up import made_up_measurement
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import VOCABULARY, write_tiny

ROWS, LENGTH = 2, 16
SCALED = {"mistral": ("mlp.down_proj", 1e5), "gemma2": ("post_feedforward_layernorm", 1e6)}
"""The tensor that takes the hidden states of each architecture beyond half precision, and what it is multiplied by."""


def beyond_half(folder: Path, name: str) -> Path:
    """A model in bfloat16 whose second layer adds more to the hidden states than half precision holds."""
    model = write_tiny(folder, TINY[name])
    tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in load_file(model / "model.safetensors").items()}
    tensor, factor = SCALED[name]
    tensors[f"model.layers.1.{tensor}.weight"] *= ml_dtypes.bfloat16(factor)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("name", SCALED)
def test_states_beyond_half_precision(name: str, tmp_path: Path) -> None:
    source, tokens = beyond_half(tmp_path / "model", name), tmp_path / "rows.safetensors"
    save_file({"input_ids": np.random.default_rng(5).integers(0, VOCABULARY, (ROWS, LENGTH))}, tokens)
    config = ConversionConfig(
        in_dir=source,
        out_dir=tmp_path / "work",
        compile_full=tmp_path / "exl2",
        cal_dataset=str(tokens),
        measurement=made_up_measurement(source, tmp_path / "measurement.json"),
        preset="stock",
    )
    result = convert(config)
    assert verify(tmp_path / "exl2").faults == ()
    *modules, _ = json.loads((config.out_dir / "quantized.json").read_text(encoding="utf-8"))
    assert all(0 < module["largest_output"] < np.inf for module in modules)
    states = np.asarray(final_states(load_exl2(tmp_path / "exl2"), load_file(tokens)["input_ids"].astype(np.int32)))
    assert (
        modules[-1]["largest_state"] == pytest.approx(np.abs(states).max(), rel=0.05)
        and np.abs(states).max() > HALF_MAX
    )
    beyond = [module["key"] for module in modules if module["largest_state"] > HALF_MAX]
    assert beyond[0] == "model.layers.1.mlp"
    told = [line for line in result.warnings if "half precision holds" in line]
    if name == "gemma2":  # ExLlamaV2 keeps its residual stream in float32, and the outputs of linears stay small
        assert told == [] and max(module["largest_output"] for module in modules) < HALF_MAX / 2
    else:
        assert len(told) == 1 and told[0].startswith("model.layers.1.mlp: states or outputs of linears reach")
        assert "ExLlamaV2 keeps both in half precision, and aborts its own conversion where 0.5 %" in told[0]
