"""A model's `config.json` as a frozen record, checked before any weight is read."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exl2jax.errors import ModelError, UnsupportedModelError
from exl2jax.models.registry import Architecture, find_architecture
from exl2jax.models.rope import RopeConfig, read_rope
from exl2jax.storage import read_json

CONFIG_NAME = "config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What the forward pass needs of a config; hashable, so it can be static under `jit`."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    max_position: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    activation: str
    rope: RopeConfig
    bos_token_id: int | None = None

    def with_rope(self, scale: float | None, alpha: float | None) -> "ModelConfig":
        """The same model with stock's `-rs` and `-ra` on top of its own rotary settings."""
        rope = replace(self.rope, scale=scale or 1.0, alpha=alpha or 1.0)
        return replace(self, rope=rope)


def read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any], str]:
    """Read and check `config.json`: the record, the raw JSON object, and the SHA-256 of its bytes.

    Raises `ModelError` naming the key at fault, `UnsupportedModelError` for what is readable but not supported.
    """
    path = directory / CONFIG_NAME
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory")
    raw = read_json(path, ModelError, "the model's configuration")
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    architecture = find_architecture(raw.get("architectures"), str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return _parse(raw, architecture, str(path)), raw, digest


def _parse(raw: dict[str, Any], architecture: Architecture, where: str) -> ModelConfig:
    hidden = _positive(raw, "hidden_size", where)
    heads = _positive(raw, "num_attention_heads", where)
    kv_heads = _positive(raw, "num_key_value_heads", where, default=heads)
    head_dim = _positive(raw, "head_dim", where, default=hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise ModelError(f"{where}: {heads} heads over {kv_heads} key/value heads of {head_dim} do not divide evenly")
    max_position = _positive(raw, "max_position_embeddings", where, default=2048)
    eps = raw.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, float | int) or not 0 < eps < 1:
        raise ModelError(f"{where}: rms_norm_eps must lie between 0 and 1, got {eps!r:.40}")
    bos = raw.get("bos_token_id")
    return ModelConfig(
        architecture=architecture.name,
        hidden_size=hidden,
        intermediate_size=_positive(raw, "intermediate_size", where),
        num_layers=_positive(raw, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_positive(raw, "vocab_size", where),
        norm_eps=float(eps),
        max_position=max_position,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=_flag(raw, architecture.qkv_bias),
        o_bias=_flag(raw, architecture.o_bias),
        mlp_bias=_flag(raw, architecture.mlp_bias),
        activation=_activation(raw, architecture, where),
        rope=read_rope(raw, max_position, where),
        bos_token_id=bos if isinstance(bos, int) else None,
    )


def _positive(raw: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(f"{where}: {key} must be a positive integer, got {value!r:.40}")
    return value


def _flag(raw: dict[str, Any], switch: bool | str) -> bool:
    return bool(raw.get(switch, False)) if isinstance(switch, str) else switch


def _activation(raw: dict[str, Any], architecture: Architecture, where: str) -> str:
    name = raw.get("hidden_act", "silu")
    if name not in architecture.activations:
        known = ", ".join(architecture.activations)
        raise UnsupportedModelError(
            f"{where}: hidden_act {name!r:.40} is not supported for {architecture.name} ({known})"
        )
    return name
