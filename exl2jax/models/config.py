"""A model's `config.json` as a frozen record, checked before any weight is read."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exl2jax.errors import ModelError
from exl2jax.models.architectures import ARCHITECTURES
from exl2jax.models.block_scales import NEUTRAL_SCALES, Scales, read_scales
from exl2jax.models.fields import Fields
from exl2jax.models.registry import Architecture, find_architecture
from exl2jax.models.rope import RopeConfig, read_rope, read_theta
from exl2jax.storage import read_json

CONFIG_NAME = "config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The values of a config that the forward pass needs; hashable, so it can be static under `jit`.

    `sliding[i]` says whether layer `i` attends to the last `window` tokens only. Sliding layers have the rotary
    settings `local_rope`, the others `rope`; None means no rotary positions. `scales` are the model's multipliers and
    soft caps.
    """

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
    rope: RopeConfig | None
    local_rope: RopeConfig | None = None
    window: int | None = None
    sliding: tuple[bool, ...] = ()
    head_norm: str | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    scales: Scales = NEUTRAL_SCALES
    bos_token_id: int | None = None

    @property
    def arch(self) -> Architecture:
        """The registry's entry of this model."""
        return ARCHITECTURES[self.architecture]

    def is_sliding(self, layer: int) -> bool:
        """Whether a layer's attention has a window."""
        return bool(self.sliding) and self.sliding[layer]

    def head_norm_shape(self, heads: int) -> tuple[int, ...]:
        """Shape of the weight that normalises `heads` heads: one for all of them, or one each (LayerNorm)."""
        return (heads, self.head_dim) if self.head_norm == "layer" else (self.head_dim,)

    def with_rope(self, scale: float | None, alpha: float | None) -> "ModelConfig":
        """The same model with stock's rotary scale and alpha on top of its own rotary settings."""

        def scaled(rope: RopeConfig | None) -> RopeConfig | None:
            return None if rope is None else replace(rope, scale=scale or 1.0, alpha=alpha or 1.0)

        return replace(self, rope=scaled(self.rope), local_rope=scaled(self.local_rope))


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
    arch = find_architecture(ARCHITECTURES, raw.get("architectures"), str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return _parse(Fields.of(raw, arch, str(path)), arch), raw, digest


def _parse(fields: Fields, arch: Architecture) -> ModelConfig:
    fields.check_taken_for_granted()
    hidden = fields.positive("hidden_size")
    heads = fields.positive("num_attention_heads")
    kv_heads = 1 if arch.multi_query else fields.positive("num_key_value_heads", default=heads)
    head_dim = fields.positive("head_dim", default=hidden // heads)
    if heads % kv_heads or head_dim % 2:
        message = f"{heads} heads over {kv_heads} key/value heads of {head_dim} do not divide evenly"
        raise ModelError(f"{fields.where}: {message}")
    max_position = fields.positive("max_position_embeddings", default=2048)
    layers = fields.positive("num_hidden_layers")
    rope = read_rope(fields.record, max_position, fields.where, head_dim=head_dim) if arch.rotary else None
    sliding, window = fields.windows(layers)
    experts, chosen = _experts(fields)
    return ModelConfig(
        architecture=arch.name,
        hidden_size=hidden,
        intermediate_size=fields.positive(arch.inner_key, default=arch.inner_multiple * hidden or None),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=fields.positive("vocab_size"),
        norm_eps=fields.epsilon(),
        max_position=max_position,
        tie_word_embeddings=fields.flag("tie_word_embeddings", arch.tied),
        qkv_bias=fields.switch(arch.qkv_bias),
        o_bias=fields.switch(arch.o_bias),
        mlp_bias=fields.switch(arch.mlp_bias),
        activation=fields.activation(),
        rope=None if arch.nope else rope,
        local_rope=_local_rope(fields, max_position) if arch.local_theta else rope,
        window=window,
        sliding=sliding,
        head_norm=arch.head_norm if fields.switch(arch.head_norm_switch) else None,
        num_experts=experts,
        experts_per_token=chosen,
        scales=read_scales(fields, layers, hidden, head_dim),
        bos_token_id=fields.token("bos_token_id"),
    )


def _experts(fields: Fields) -> tuple[int, int]:
    """The number of experts, and the number that a token goes to; 0 and 0 in a dense architecture."""
    if fields.arch.router is None:
        return 0, 0
    experts, chosen = fields.positive("num_experts"), fields.positive("num_experts_per_tok")
    if chosen > experts or experts < 2:
        raise ModelError(f"{fields.where}: num_experts_per_tok is {chosen}, num_experts {experts}")
    return experts, chosen


def _local_rope(fields: Fields, max_position: int) -> RopeConfig:
    """Rotary settings of sliding layers with a base of their own, which are not scaled."""
    theta = read_theta(fields.record, fields.arch.local_theta or "rope_theta", fields.where)
    return RopeConfig(theta=theta, max_position=max_position, original_max_position=max_position)
