"""`config.json` as a checked record: what is read, and one message naming file and key for what is wrong."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from exl2jax.errors import ModelError, UnsupportedModelError
from exl2jax.models import ModelConfig, head_spec, module_specs, read_config

GOOD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
}


def read(directory: Path, **changes: Any) -> ModelConfig:
    """The config with some keys changed; `...` takes a key out."""
    record = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(record), encoding="utf-8")
    return read_config(directory)[0]


def test_what_a_config_says(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.architecture, config.hidden_size, config.intermediate_size) == ("LlamaForCausalLM", 96, 256)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 6, 2, 16)
    assert (config.vocab_size, config.norm_eps, config.max_position) == (300, 1e-5, 512)
    assert (config.tie_word_embeddings, config.bos_token_id) == (True, 1)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)
    assert config.rope is not None and config.rope.theta == 50000.0
    assert hash(config) == hash(read(tmp_path))


def test_raw_record_and_digest_come_along(tmp_path: Path) -> None:
    read(tmp_path, another_key=[1, 2])
    _, raw, digest = read_config(tmp_path)
    assert raw == GOOD | {"another_key": [1, 2]}
    assert digest == hashlib.sha256((tmp_path / "config.json").read_bytes()).hexdigest()


def test_defaults_of_older_configs(tmp_path: Path) -> None:
    gone: dict[str, Any] = dict.fromkeys(
        ["num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_theta", "bos_token_id"],
        ...,
    )
    config = read(tmp_path, tie_word_embeddings=..., **gone)
    assert config.num_kv_heads == 6
    assert config.rope is not None
    assert (config.norm_eps, config.max_position, config.rope.theta) == (1e-6, 2048, 10000.0)
    assert (config.tie_word_embeddings, config.bos_token_id) == (False, None)


def test_head_dim_may_differ_from_the_quotient(tmp_path: Path) -> None:
    assert read(tmp_path, head_dim=64).head_dim == 64
    assert read(tmp_path, head_dim=None).head_dim == 16


def test_biases_follow_their_switches(tmp_path: Path) -> None:
    config = read(tmp_path, attention_bias=True)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)
    assert read(tmp_path, mlp_bias=True).mlp_bias


def test_rope_of_the_command_line_lies_on_top(tmp_path: Path) -> None:
    config = read(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    changed = config.with_rope(4.0, None)
    assert changed.rope is not None
    assert (changed.rope.scale, changed.rope.alpha, changed.rope.kind) == (4.0, 1.0, "linear")
    assert config.with_rope(None, None) == config
    stretched = config.with_rope(None, 2.5).rope
    assert stretched is not None and stretched.alpha == 2.5


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("value", [..., None, 0, -1, 1.5, "64", True, [64]])
def test_a_size_must_be_a_positive_integer(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {key} must be a positive integer, got"):
        read(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_key_value_heads": 4}, "6 heads over 4 key/value heads"),
        ({"head_dim": 15}, "of 15 do not divide evenly"),
        ({"num_attention_heads": 100, "num_key_value_heads": 100}, "head_dim must be a positive integer, got 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "NaN is no JSON number"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
    ],
)
def test_values_that_contradict(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelError, match=re.escape(str(tmp_path)) + rf".*config\.json: .*{re.escape(what)}"):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["MambaForCausalLM"], "architecture MambaForCausalLM is not supported (supported: "),
        (["llamaforcausallm"], "architecture llamaforcausallm is not supported"),
        (["LlamaForCausalLM", "Other"], "exactly one architecture"),
        ([], "exactly one architecture"),
        ("LlamaForCausalLM", "exactly one architecture"),
        (None, "exactly one architecture"),
        ([3], "exactly one architecture"),
    ],
)
def test_unknown_architectures_are_refused_by_name(tmp_path: Path, names: object, what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(what)):
        read(tmp_path, architectures=names)


def test_unknown_activations_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="hidden_act 'relu' is not supported for LlamaForCausalLM"):
        read(tmp_path, hidden_act="relu")


def test_missing_directory_and_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such model directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json: the model's configuration is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_unreadable_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json: "):
        read_config(tmp_path)


def test_the_modules_a_config_implies(tmp_path: Path) -> None:
    config = read(tmp_path, attention_bias=True, head_dim=32)
    specs = module_specs(config)
    assert [s.key for s in specs] == [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("self_attn", "mlp")]
    attention, mlp = specs[2:4]
    assert [(s.name, s.rows, s.columns, s.bias) for s in attention.linears] == [
        ("q_proj", 96, 192, True),
        ("k_proj", 96, 64, True),
        ("v_proj", 96, 64, True),
        ("o_proj", 192, 96, True),
    ]
    assert [(s.name, s.rows, s.columns, s.bias) for s in mlp.linears] == [
        ("gate_proj", 96, 256, False),
        ("up_proj", 96, 256, False),
        ("down_proj", 256, 96, False),
    ]
    assert (attention.kind, attention.norms[0].key, attention.layer) == (
        "self_attn",
        "model.layers.1.input_layernorm",
        1,
    )
    assert (mlp.kind, mlp.norms[0].key) == ("mlp", "model.layers.1.post_attention_layernorm")
    assert [[x.name for x in group] for group in mlp.groups] == [["gate_proj", "up_proj"], ["down_proj"]]
    assert mlp.linears[-1].key == "model.layers.1.mlp.down_proj"
    assert (attention.weights, mlp.weights) == (96 * (192 + 64 + 64) + 192 * 96, 3 * 96 * 256)
    assert (head_spec(config).key, head_spec(config).rows, head_spec(config).columns) == ("lm_head", 96, 300)
    # Embedding 0, two modules for each of three layers 1 to 6.
    assert [spec.index for spec in specs] == [1, 2, 3, 4, 5, 6]
