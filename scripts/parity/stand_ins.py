"""Stand-ins for models that `transformers` does not know: known models with the same mathematics.

A stand-in takes the config and the tensors of a directory and gives those of its equivalent, and perhaps a change to
the model that was built from them. Runs beside torch only.
"""

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file
from torch import nn  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


class StandIn(NamedTuple):
    """`translate` gives the equivalent's config and tensors, `change` is applied to the model before its weights."""

    translate: Callable[[Config, Tensors], tuple[Config, Tensors]]
    change: Callable[[Any], None] | None = None


def auto_class(config: Config) -> Any:
    """The class of `transformers` that loads a model, with its vision tower where it has one."""
    return AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM


def load_reference(directory: Path) -> Any:
    """The torch model of a directory in float32, or its stand-in."""
    config = json.loads((directory / "config.json").read_text())
    name = config["architectures"][0]
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if name not in STAND_INS:
        return auto_class(config).from_pretrained(directory, **options)
    stand_in = STAND_INS[name]
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    config, tensors = stand_in.translate(config, {k: v.float() for k, v in tensors.items()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(config))
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"}
        )
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    if stand_in.change:
        stand_in.change(model)
        model.load_state_dict(tensors, strict=not config["tie_word_embeddings"])
        model.float()
    return model.eval()


def _as(architecture: str, model_type: str, config: Config, **changes: Any) -> Config:
    return {**config, "architectures": [architecture], "model_type": model_type, **changes}


def _renamed(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    out = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = tensor
    return out


def _yi(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    names = (".ln1.", ".input_layernorm."), (".ln2.", ".post_attention_layernorm.")
    return _as("LlamaForCausalLM", "llama", config), _renamed(tensors, *names)


def _minicpm(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    width = config["head_dim"]
    granite = _as(
        "GraniteForCausalLM",
        "granite",
        config,
        embedding_multiplier=float(config["scale_emb"]),
        residual_multiplier=config["scale_depth"] / math.sqrt(config["num_hidden_layers"]),
        attention_multiplier=width**-0.5,
        logits_scaling=config["hidden_size"] / config["dim_model_base"],
        tie_word_embeddings=True,
    )
    return granite, tensors


def _index(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    head = nn.functional.normalize(tensors["lm_head.weight"])
    return _as("LlamaForCausalLM", "llama", config), tensors | {"lm_head.weight": head}


def _internlm2(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Each key/value head's block of `wqkv` holds the queries of its group, then the key, then the value."""
    out = _renamed(
        tensors,
        ("model.tok_embeddings", "model.embed_tokens"),
        ("output.", "lm_head."),
        ("attention.wo.", "self_attn.o_proj."),
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("feed_forward.w1.", "mlp.gate_proj."),
        ("feed_forward.w3.", "mlp.up_proj."),
        ("feed_forward.w2.", "mlp.down_proj."),
    )
    heads, width = config["num_key_value_heads"], config["head_dim"]
    group = config["num_attention_heads"] // heads
    for name in [name for name in out if "wqkv" in name]:
        blocks = out.pop(name).reshape(heads, group + 2, width, -1)
        parts = {"q_proj": blocks[:, :group], "k_proj": blocks[:, group], "v_proj": blocks[:, group + 1]}
        for part, value in parts.items():
            key = name.replace("attention.wqkv", f"self_attn.{part}")
            out[key] = value.reshape(-1, blocks.shape[-1])
    return _as("LlamaForCausalLM", "llama", config), out


def _orion(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    return _as("LlamaForCausalLM", "llama", config), tensors


def _gemmoe(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Gemma's norms add one to their weight, its embeddings are scaled by the root of the hidden size."""
    out = {k: v + 1 if k.endswith("norm.weight") else v for k, v in tensors.items()}
    scale = config["hidden_size"] ** 0.5
    out["lm_head.weight"] = out["model.embed_tokens.weight"]
    out["model.embed_tokens.weight"] = out["model.embed_tokens.weight"] * scale
    changes = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": False, "sliding_window": None}
    return _as("MixtralForCausalLM", "mixtral", config, **changes), out


def _layer_norms(model: Any) -> None:
    """LayerNorm in place of every norm of a Llama."""

    def fresh() -> nn.LayerNorm:
        return nn.LayerNorm(model.config.hidden_size, eps=model.config.rms_norm_eps)

    model.model.norm = fresh()
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = fresh(), fresh()


STAND_INS = {
    "YiForCausalLM": StandIn(_yi),
    "MiniCPMForCausalLM": StandIn(_minicpm),
    "IndexForCausalLM": StandIn(_index),
    "InternLM2ForCausalLM": StandIn(_internlm2),
    "GemmoeForCausalLM": StandIn(_gemmoe),
    "OrionForCausalLM": StandIn(_orion, _layer_norms),
}
