"""Reading a model one module at a time, from Hugging Face and from EXL2 directories, and every fault by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax.errors import FormatError, ModelError, SettingsError
from exl2jax.models import Exl2Model, HFModel, ModuleSpec, head_spec, load_exl2, module_specs, open_model
from exl2jax.ops import pack_linear, round_to_nearest
from exl2jax.qparams import q
from exl2jax.testing.tiny_model import TinyLlama, tiny_weights, write_tiny_llama

TINY = TinyLlama()
UNTIED = TinyLlama(seed=1, tie=False, attention_bias=True, mlp_bias=True, dtype="bfloat16", shards=3, num_layers=3)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def hf(directory: Path) -> HFModel:
    model = open_model(directory)
    assert isinstance(model, HFModel)
    return model


def specs_of(directory: Path) -> tuple[ModuleSpec, ...]:
    return module_specs(open_model(directory).config)


def check_all_weights(directory: Path, options: TinyLlama) -> None:
    """Every parameter is the stored tensor in float32, kernels transposed to `[in, out]`."""
    weights = {name: tensor.astype(np.float32) for name, tensor in tiny_weights(options).items()}
    model = hf(directory)
    model.check_headers()
    seen = {"model.embed_tokens.weight", "model.norm.weight"}
    assert np.array_equal(model.embedding(), weights["model.embed_tokens.weight"])
    for spec in module_specs(model.config):
        params = model.module_params(spec)
        assert np.array_equal(params["norm"]["weight"], weights[f"{spec.norms[0].key}.weight"])
        seen.add(f"{spec.norms[0].key}.weight")
        for linear in spec.linears:
            kernel = params[linear.name]["kernel"]
            assert kernel.dtype == np.float32
            assert kernel.flags.c_contiguous
            assert np.array_equal(kernel, weights[f"{linear.key}.weight"].T)
            seen.add(f"{linear.key}.weight")
            assert ("bias" in params[linear.name]) == (f"{linear.key}.bias" in weights)
            if "bias" in params[linear.name]:
                assert np.array_equal(params[linear.name]["bias"], weights[f"{linear.key}.bias"])
                seen.add(f"{linear.key}.bias")
    head = model.head_params()
    name = "model.embed_tokens.weight" if options.tie else "lm_head.weight"
    assert np.array_equal(head["lm_head"]["kernel"], weights[name].T)
    assert np.array_equal(head["norm"]["weight"], weights["model.norm.weight"])
    assert seen | {name} == set(weights)


def test_float16_in_one_file_with_a_tied_head(tiny_llama: Path) -> None:
    check_all_weights(tiny_llama, TINY)


def test_bfloat16_in_shards_with_biases_and_a_head_of_its_own(tiny_llama_untied: Path) -> None:
    check_all_weights(tiny_llama_untied, UNTIED)


def test_float32(tmp_path: Path) -> None:
    check_all_weights(write_tiny_llama(tmp_path, dtype="float32"), TinyLlama(dtype="float32"))


def test_command_line_rope_reaches_the_config(tiny_llama: Path) -> None:
    model = open_model(tiny_llama, rope_scale=2.0, rope_alpha=3.0)
    assert (model.config.rope.scale, model.config.rope.alpha) == (2.0, 3.0)


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Rewrite the one weight file."""
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


def without(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def replaced(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: tensors | {name: value}


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_headers_show_missing_misshapen_and_integer_tensors(tmp_path: Path, tiny_llama: Path, name: str) -> None:
    good = load_file(tiny_llama / "model.safetensors")[name]
    faults = [
        (without(name), f"tensor {name} is missing"),
        (replaced(name, good[:-1]), rf"model\.safetensors: {name} has shape .* config\.json implies"),
        (replaced(name, good.astype(np.int8)), rf"model\.safetensors: {name} is I8, expected"),
    ]
    for change, message in faults:
        directory = copy(tiny_llama, tmp_path)
        edit(directory, change)
        with pytest.raises(ModelError, match=message):
            hf(directory).check_headers()


def test_a_transposed_weight_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    directory = copy(tiny_llama, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    edit(directory, lambda t: t | {name: np.ascontiguousarray(t[name].T)})
    with pytest.raises(ModelError, match=rf"{name} has shape \[64, 160\], config\.json implies \[160, 64\]"):
        hf(directory).check_headers()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_weights_are_named(tmp_path: Path, tiny_llama: Path, bad: float) -> None:
    directory = copy(tiny_llama, tmp_path)
    name = f"{Q_PROJ}.weight"

    def spoil(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors[name][3, 5] = bad
        return tensors

    edit(directory, spoil)
    model = hf(directory)
    model.check_headers()
    with pytest.raises(ModelError, match=rf"model\.safetensors: {name} holds NaN or infinity"):
        model.module_params(specs_of(directory)[0])
    model.module_params(specs_of(directory)[1])


def test_an_untied_model_needs_its_head(tmp_path: Path, tiny_llama: Path) -> None:
    directory = copy(tiny_llama, tmp_path)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    for read in (hf(directory).check_headers, hf(directory).head_params):
        with pytest.raises(ModelError, match=r"lm_head\.weight is missing and the embeddings are not tied"):
            read()


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    directory = write_tiny_llama(tmp_path, attention_bias=True)
    edit(directory, without(f"{Q_PROJ}.bias"))
    with pytest.raises(ModelError, match=rf"tensor {Q_PROJ}\.bias is missing"):
        hf(directory).check_headers()


def test_weights_of_two_models_have_different_digests(tmp_path: Path, tiny_llama: Path) -> None:
    same = copy(tiny_llama, tmp_path / "same")
    other = write_tiny_llama(tmp_path / "other", num_layers=1)
    assert hf(same).weights_digest() == hf(tiny_llama).weights_digest() != hf(other).weights_digest()


def test_a_fine_tune_of_the_same_shapes_has_another_digest(tmp_path: Path, tiny_llama: Path) -> None:
    tuned = write_tiny_llama(tmp_path / "tuned", seed=TINY.seed + 1)
    files = [(path / "model.safetensors").stat().st_size for path in (tuned, tiny_llama)]
    assert files[0] == files[1]
    assert hf(tuned).weights_digest() != hf(tiny_llama).weights_digest()


def exl2(source: Path, target: Path, **quantization: Any) -> Path:
    """An EXL2 directory whose first query projection (40 of its 64 columns kept) and head are quantized."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings = {"quantization_config": {"quant_method": "exl2"} | quantization}
    shape = {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8, "attention_bias": True}
    (target / "config.json").write_text(json.dumps(config | settings | shape), encoding="utf-8")
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for key, columns, bias in ((Q_PROJ, 40, np.linspace(-1, 1, 40)), ("lm_head", 320, None)):
        w = jnp.asarray(rng.standard_normal((64, columns)), jnp.float32)
        linear = round_to_nearest(w, jnp.asarray(rng.permutation(64), jnp.int32), q("6", "1", "32").groups(64))
        tensors |= pack_linear(linear, bias).tensors(key)
        tensors[f"{key}.expected"] = np.asarray(linear.weight)
    save_file({k: v for k, v in tensors.items() if not k.endswith("expected")}, target / "output.safetensors")
    np.savez(target / "expected.npz", **{k: v for k, v in tensors.items() if k.endswith("expected")})
    return target


def test_an_exl2_directory_gives_dequantized_weights_without_padding(tmp_path: Path, tiny_llama: Path) -> None:
    directory = exl2(tiny_llama, tmp_path)
    model = open_model(directory)
    assert isinstance(model, Exl2Model)
    spec = specs_of(directory)[0].linears[0]
    params = model.linear_params(spec)
    expected = np.load(directory / "expected.npz")
    assert params["kernel"].dtype == np.float16
    assert np.array_equal(params["kernel"], expected[f"{Q_PROJ}.expected"])
    assert np.array_equal(params["bias"], np.linspace(-1, 1, 40).astype(np.float16).astype(np.float32))
    head = model.kernel(head_spec(model.config))
    assert np.array_equal(head, expected["lm_head.expected"])


def test_load_exl2_opens_no_other_kind(tmp_path: Path, tiny_llama: Path) -> None:
    assert load_exl2(exl2(tiny_llama, tmp_path)).config.num_heads == 5
    with pytest.raises(FormatError, match=r"config\.json: no quantization_config"):
        load_exl2(tiny_llama)


def test_a_damaged_exl2_linear_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    directory = exl2(tiny_llama, tmp_path)
    path = directory / "output.safetensors"
    tensors = load_file(path)
    save_file(tensors | {f"{Q_PROJ}.q_groups": np.asarray([6, 0, 6, 13], np.int16)}, path)
    spec = specs_of(directory)[0].linears[0]
    with pytest.raises(FormatError, match=rf"{directory}: {Q_PROJ}: q_groups"):
        open_model(directory).kernel(spec)
    save_file(without(f"{Q_PROJ}.q_scale")(tensors), path)
    with pytest.raises(ModelError, match=rf"tensor {Q_PROJ}\.q_scale is missing"):
        open_model(directory).kernel(spec)


@pytest.mark.parametrize("given", [{"quant_method": "gptq", "bits": 4}, "awq"])
def test_models_quantized_otherwise_are_refused(tmp_path: Path, tiny_llama: Path, given: object) -> None:
    directory = copy(tiny_llama, tmp_path)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": given}), encoding="utf-8")
    assert [note.split(": ")[0] for note in hf(directory).notes] == ["config.json"]  # the weights are plain
    edit(directory, without(f"{Q_PROJ}.weight"))
    with pytest.raises(SettingsError, match=r"config\.json: the model is already quantized \((gptq|awq)\)"):
        open_model(directory)
