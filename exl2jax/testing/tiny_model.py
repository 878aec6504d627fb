"""Tiny random Llama models as complete Hugging Face directories.

Every tensor is drawn from a stream of its own, seeded by the model's seed and the tensor's name: the same options give
the same bytes, and one more layer leaves the others as they were. The module needs NumPy, ml_dtypes, safetensors and
tokenizers only, and runs on Python 3.11 too: `scripts/parity/reference.py` builds the same models beside torch.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}  # ids 0, 1, 2
BYTE_TOKENS = 256
MAX_MERGES = 40

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}

MERGE_TEXT = [
    "A small river runs through the town, and the children run along the river in the morning.",
    "The weaver counts the threads: one for the sun, two for the rain, three for the wind.",
    "def add(left, right):\n    return left + right\n",
    "In the 12th year there were 340 houses, 57 wells and one bridge; in the 13th there were two.",
    "Der Fluss ist breit, le vent est froid, la luna es blanca.",
]


@dataclass(frozen=True)
class TinyLlama:
    """The options of `write_tiny_llama`: sizes of the model and spelling of its files."""

    seed: int = 0
    hidden_size: int = 64
    intermediate_size: int = 160
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    vocab_size: int = 320
    tie: bool = True
    dtype: str = "float16"
    rope_scaling: Mapping[str, Any] | None = None
    rope_theta: float = 10000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 256
    shards: int = 1
    extra_config: Mapping[str, Any] | None = None

    @property
    def width(self) -> int:
        """Size of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads


def write_tiny_llama(path: Path, **options: Any) -> Path:
    """Write the model that the options (fields of `TinyLlama`) describe into `path`; returns `path`.

    `head_dim` is written to `config.json` only when given. `shards` above one spreads the tensors over several files
    with an index. `extra_config` is laid over `config.json` last, and a value of `...` takes the key out.
    """
    model = TinyLlama(**options)
    if model.vocab_size < len(SPECIAL_TOKENS) + BYTE_TOKENS:
        raise ValueError(f"vocab_size {model.vocab_size} has no room for the special tokens and the bytes")
    write_directory(path, _config(model), tiny_weights(model), model.shards)
    return path


def write_directory(path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1) -> None:
    """Write a complete model directory: weights, config, and a tokenizer for the vocabulary of the config."""
    config = {key: value for key, value in config.items() if value is not ...}
    path.mkdir(parents=True, exist_ok=True)
    _write_weights(path, tensors, shards)
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {f"{key}_id": index for index, key in enumerate(SPECIAL_TOKENS)})
    text = {**config.get("text_config", {}), **config}
    _write_tokenizer(path, text["vocab_size"], text.get("max_position_embeddings", 256))


def tiny_weights(model: TinyLlama) -> dict[str, np.ndarray]:
    """All tensors of the model by their Hugging Face keys, linears as `[out_features, in_features]`."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.width, model.num_kv_heads * model.width
    linears = {
        "self_attn.q_proj": (queries, hidden, 1.5, model.attention_bias),
        "self_attn.k_proj": (keys, hidden, 1.5, model.attention_bias),
        "self_attn.v_proj": (keys, hidden, 1.0, model.attention_bias),
        "self_attn.o_proj": (hidden, queries, 0.5, model.attention_bias),
        "mlp.gate_proj": (inner, hidden, 1.0, model.mlp_bias),
        "mlp.up_proj": (inner, hidden, 1.0, model.mlp_bias),
        "mlp.down_proj": (hidden, inner, 0.5, model.mlp_bias),
    }
    tensors = {
        "model.embed_tokens.weight": _normal(model, "model.embed_tokens.weight", (model.vocab_size, hidden), 0.25)
    }
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            key = f"{prefix}.{norm}.weight"
            tensors[key] = _norm_weight(model, key)
        for name, (rows, columns, gain, bias) in linears.items():
            tensors |= _linear(model, f"{prefix}.{name}", rows, columns, gain, bias)
    tensors["model.norm.weight"] = _norm_weight(model, "model.norm.weight")
    if not model.tie:
        tensors["lm_head.weight"] = _normal(model, "lm_head.weight", (model.vocab_size, hidden), 2.0 * hidden**-0.5)
    return {key: tensor.astype(DTYPES[model.dtype]) for key, tensor in tensors.items()}


def weights_digest(path: Path) -> str:
    """SHA-256 over the weight files of a model directory, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _stream(model: TinyLlama, key: str) -> np.random.Generator:
    return np.random.default_rng([model.seed, zlib.crc32(key.encode())])


def _normal(model: TinyLlama, key: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    return _stream(model, key).standard_normal(shape) * scale


def _norm_weight(model: TinyLlama, key: str) -> np.ndarray:
    """Around one, with a few large channels: so the linears that follow see outlier inputs, as in real models."""
    weight = 1.0 + _normal(model, key, (model.hidden_size,), 0.1)
    weight[_outliers(model, key, model.hidden_size)] *= 5.0
    return weight


def _outliers(model: TinyLlama, key: str, size: int) -> np.ndarray:
    return _stream(model, key + ".outliers").choice(size, size=max(1, size // 32), replace=False)


def _linear(model: TinyLlama, name: str, rows: int, columns: int, gain: float, bias: bool) -> dict[str, np.ndarray]:
    """Weight, and bias if there is one. v and up have a few strong rows: outlier inputs of o and down."""
    weight = _normal(model, f"{name}.weight", (rows, columns), gain * columns**-0.5)
    if name.endswith(("v_proj", "up_proj")):
        weight[_outliers(model, name, rows)] *= 4.0
    tensors = {f"{name}.weight": weight}
    if bias:
        tensors[f"{name}.bias"] = _normal(model, f"{name}.bias", (rows,), 0.3)
    return tensors


def _write_weights(path: Path, tensors: Mapping[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return
    keys = list(tensors)
    weight_map = {}
    for shard in range(shards):
        # Neighbours in the model land in different files, so that a reader has to follow the index.
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in keys[shard::shards]}
        save_file(part, path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {key: weight_map[key] for key in keys}}
    _write_json(path / "model.safetensors.index.json", index)


def _config(model: TinyLlama) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": model.dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": ... if model.head_dim is None else model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": dict(model.rope_scaling) if model.rope_scaling else None,
        "attention_bias": model.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": model.mlp_bias,
        "tie_word_embeddings": model.tie,
        "use_cache": True,
        **{f"{key}_id": index for index, key in enumerate(SPECIAL_TOKENS)},
        **(model.extra_config or {}),
    }


def _write_tokenizer(path: Path, vocab_size: int, max_position: int) -> None:
    """Byte-level BPE: the special tokens, the 256 bytes, then as many merges as fit (at most `MAX_MERGES`)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, len(SPECIAL_TOKENS) + BYTE_TOKENS + MAX_MERGES),
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(MERGE_TEXT, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_position,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        **SPECIAL_TOKENS,
    }
    _write_json(path / "tokenizer_config.json", settings)
    _write_json(path / "special_tokens_map.json", SPECIAL_TOKENS)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
