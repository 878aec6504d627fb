"""Configs that were tampered with: a named refusal, or exactly what the untouched config says, never anything else."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from exl2jax.errors import ModelError, UnsupportedModelError
from exl2jax.models import HFModel, open_model, read_config
from exl2jax.models.architectures import ARCHITECTURES
from exl2jax.models.spelling import stock_spelling
from exl2jax.models.tensors import canonical_name, rescale
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import TinyArchitecture, write_tiny

SIZES = (
    ("hidden_size", "n_embd", "d_model"),
    ("num_hidden_layers", "n_layer", "n_layers"),
    ("num_attention_heads", "n_head", "n_heads"),
    ("vocab_size",),
)
NOT_A_SIZE = st.sampled_from([0, -1, 2.5, "64", True, [64], {}])


def config_of(tiny: TinyArchitecture) -> dict[str, Any]:
    record = {"architectures": [tiny.architecture], **tiny.config}
    return {key: copy.deepcopy(value) for key, value in record.items() if value is not ...}


def text_of(record: dict[str, Any]) -> dict[str, Any]:
    """The part that holds the sizes of the language model."""
    return record.get("text_config", record)


def read(directory: Path, record: dict[str, Any]) -> Any:
    (directory / "config.json").write_text(json.dumps(record), encoding="utf-8")
    return read_config(directory)[0]


names = st.sampled_from(sorted(TINY))
unhurried = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@unhurried
@given(name=names, junk=st.text(max_size=30))
def test_an_unknown_architecture(name: str, junk: str, tmp_path: Path) -> None:
    if junk in ARCHITECTURES:
        return
    with pytest.raises(UnsupportedModelError, match="architecture"):
        read(tmp_path, config_of(TINY[name]) | {"architectures": [junk]})


@unhurried
@given(name=names, sizes=st.sampled_from(SIZES), value=NOT_A_SIZE)
def test_a_size_that_is_none(name: str, sizes: tuple[str, ...], value: object, tmp_path: Path) -> None:
    record = config_of(TINY[name])
    key = next(key for key in sizes if key in text_of(record))
    text_of(record)[key] = value
    with pytest.raises(ModelError, match=rf"config\.json: {sizes[0]} must be a positive integer"):
        read(tmp_path, record)
    del text_of(record)[key]
    if dict(ARCHITECTURES[TINY[name].architecture].stock_defaults).get(sizes[0]) is None:
        with pytest.raises(ModelError, match=rf"config\.json: {sizes[0]} must be a positive integer"):
            read(tmp_path, record)


@unhurried
@given(name=names, act=st.sampled_from(["relu", "swish2", "", 3, ["silu"]]))
def test_an_unknown_activation(name: str, act: object, tmp_path: Path) -> None:
    record = config_of(TINY[name])
    key = ARCHITECTURES[TINY[name].architecture].activation_keys[0]
    place: dict[str, Any] = text_of(record)
    *outer, last = key.split(".")
    for part in outer:
        place = place[part]
    place[last] = act
    with pytest.raises(UnsupportedModelError, match="is not supported for"):
        read(tmp_path, record)


@unhurried
@given(name=names, kind=st.sampled_from(["spiral", "su4", 3, "LINEAR"]))
def test_an_unknown_rope_type(name: str, kind: object, tmp_path: Path) -> None:
    if ARCHITECTURES[TINY[name].architecture].rotary is None:
        return
    record = config_of(TINY[name])
    text_of(record).pop("rope_parameters", None)
    text_of(record)["rope_scaling"] = {"rope_type": kind, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="rope_scaling type"):
        read(tmp_path, record)


@unhurried
@given(name=names, key=st.sampled_from(["residual_multiplier", "logit_scale", "attn_logit_softcapping", "norm_head"]))
def test_a_scale_that_the_architecture_does_not_know(name: str, key: str, tmp_path: Path) -> None:
    """The runtime applies these keys to every model."""
    arch = ARCHITECTURES[TINY[name].architecture]
    if key in arch.scales:
        return
    with pytest.raises(UnsupportedModelError, match=f"{key} .* means nothing to {arch.name}"):
        read(tmp_path, config_of(TINY[name]) | {key: 3})


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("gemma3", {"rope_local_base_freq": 5000.0}, "rope_local_base_freq is 5000.0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt_bigcode", {"multi_query": False}, "multi_query is False"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("llava", {"vision_config": {"model_type": "clip_vision_model"}}, "runs with 'pixtral' only"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ("cohere2", {"layer_types": ["full_attention", "sliding_attention"]}, "do not follow the pattern"),
        ("phi3", {"original_max_position_embeddings": None}, "needs original_max_position_embeddings"),
        ("qwen2", {"num_key_value_heads": 3}, "do not divide evenly"),
        ("glm4", {"partial_rotary_factor": 1.5}, "partial_rotary_factor must lie between 0 and 1"),
    ],
)
def test_what_the_runtime_would_get_wrong(name: str, change: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=what):
        read(tmp_path, config_of(TINY[name]) | change)


@pytest.mark.parametrize("name", TINY)
def test_a_sound_model_causes_no_note(name: str, tmp_path: Path) -> None:
    """Every stored tensor of an architecture is read, and its head is what its config says."""
    model = open_model(write_tiny(tmp_path / "m", TINY[name]))
    assert isinstance(model, HFModel)
    model.check_headers()
    assert model.notes == ()


def test_a_bias_of_the_head_is_refused(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "m", TINY["qwen2"])
    path = directory / "model.safetensors"
    save_file(load_file(path) | {"lm_head.bias": np.zeros(300, np.float16)}, path)
    model = open_model(directory)
    assert isinstance(model, HFModel)
    with pytest.raises(ModelError, match=r"lm_head\.bias is there, config\.json implies no bias"):
        model.check_headers()


def test_the_language_models_section_may_say_tied_as_well(tmp_path: Path) -> None:
    """Two sections of a config that contradict each other do not matter where the head is stored."""
    for outer, inner in ((True, False), (False, True)):
        tiny = TINY["mistral3"]
        text = dict(tiny.config["text_config"]) | {"tie_word_embeddings": inner}
        changed = replace(tiny, config={**tiny.config, "text_config": text, "tie_word_embeddings": outer})
        model = open_model(write_tiny(tmp_path / str(outer), changed))
        assert isinstance(model, HFModel)
        assert not model.config.tie_word_embeddings
        assert model.head_name == "language_model.lm_head.weight"


def test_a_bias_that_the_config_does_not_announce(tmp_path: Path) -> None:
    tiny = TINY["qwen2"]
    llama = TinyArchitecture("LlamaForCausalLM", tiny.config, biased=tiny.biased, head=None)
    model = open_model(write_tiny(tmp_path / "m", llama))
    assert isinstance(model, HFModel)
    with pytest.raises(ModelError, match=r"q_proj\.bias is there, config\.json implies no bias in LlamaForCausalLM"):
        model.check_headers()


def test_a_config_in_the_old_spelling_stays_as_it_is() -> None:
    for name in ("mistral", "qwen2", "qwen3", "granite", "phi3", "gemma2", "cohere", "mixtral", "qwen2_vl"):
        record = config_of(TINY[name])
        assert stock_spelling(record, ARCHITECTURES[TINY[name].architecture]) == record, name


def test_newer_spellings_are_brought_back() -> None:
    llama = ARCHITECTURES["LlamaForCausalLM"]
    new = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}}
    old = stock_spelling(new | {"max_position_embeddings": 64}, llama)
    assert old["rope_theta"] == 5e5
    assert old["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    both = {"rms_norm_eps": 1e-5, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}
    assert stock_spelling(both, llama)["rope_scaling"] == {"type": "linear", "factor": 2.0}
    sections = {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]}}
    assert stock_spelling(sections, ARCHITECTURES["Qwen2VLForConditionalGeneration"])["rope_scaling"]["type"] == "mrope"


def test_names_are_replaced_in_order() -> None:
    gpt2 = ARCHITECTURES["GPT2LMHeadModel"]
    assert canonical_name("h.3.attn.c_proj.bias", gpt2) == "model.layers.3.self_attn.o_proj.bias"
    assert canonical_name("transformer.wte.weight", gpt2) == "model.embed_tokens.weight"
    dbrx = ARCHITECTURES["DbrxForCausalLM"]
    assert canonical_name("transformer.blocks.1.ffn.experts.mlp.v1", dbrx) == (
        "model.layers.1.block_sparse_moe.experts.v1.weight"
    )


def test_fp8_weights_are_scaled_block_by_block() -> None:
    import ml_dtypes

    value = np.arange(1, 13, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.float8_e4m3fn)
    scale = np.asarray([[1.0, 0.5], [2.0, 4.0]], np.float32)
    expected = [[1, 2, 1.5, 2], [5, 6, 3.5, 4], [18, 20, 44, 48]]
    np.testing.assert_array_equal(rescale(value, scale, (2, 2), "w"), expected)
    with pytest.raises(ModelError, match=r"w_scale_inv has shape \[1, 2\], blocks of \(2, 2\) need \[2, 2\]"):
        rescale(value, scale[:1], (2, 2), "w")
