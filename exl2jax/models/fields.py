"""Reading the keys of a `config.json`: spellings, defaults and types, with an error message for each fault."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from exl2jax.errors import ModelError, UnsupportedModelError
from exl2jax.models.registry import Architecture, Switch
from exl2jax.models.spelling import TEXT_SECTION, stock_spelling

SPELLINGS = {
    "hidden_size": ("hidden_size", "d_model", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads", "attn_config.kv_n_heads"),
    "intermediate_size": ("intermediate_size", "ffn_config.ffn_hidden_size", "n_inner"),
    "num_experts": ("num_local_experts", "num_experts", "ffn_config.moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "ffn_config.moe_top_k"),
    "rope_theta": ("rope_theta", "attn_config.rope_theta"),
    "max_position_embeddings": ("max_position_embeddings", "max_seq_len", "n_positions"),
}
"""Other names of a key; a dot reaches into an object. The stock runtime reads all of them."""


MAX_LAYERS, MAX_SIZE, MAX_NUMBER = 2**12, 2**26, 1e300
"""Bounds of the sizes in a config, far beyond any model, so that a malicious config cannot cost hours of planning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """The keys of a config as an architecture reads them; the keys of a nested `text_config` count like outer ones."""

    record: Mapping[str, Any]
    arch: Architecture
    where: str

    @classmethod
    def of(cls, raw: Mapping[str, Any], arch: Architecture, where: str) -> "Fields":
        """Lay the outer keys over those of `text_config`, both in the spelling that the stock runtime reads."""
        raw = stock_spelling(raw, arch)
        inner = raw.get(TEXT_SECTION)
        if not isinstance(inner, dict | None):
            raise ModelError(f"{where}: {TEXT_SECTION} must be an object, got {inner!r:.40}")
        outer = {k: v for k, v in raw.items() if v is not None}
        fields = cls(record={**dict(arch.stock_defaults), **(inner or {}), **outer}, arch=arch, where=where)
        return replace(fields, record={**fields.record, "rope_theta": fields.get("rope_theta")})

    def get(self, key: str) -> Any:
        """The value of a key under any of its spellings, None where there is none."""
        for spelling in SPELLINGS.get(key, (key,)):
            value: Any = self.record
            for part in spelling.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                return value
        return None

    def positive(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ModelError(f"{self.where}: {key} must be a positive integer, got {value!r:.40}")
        limit = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE
        if value > limit:
            raise ModelError(f"{self.where}: {key} is {value!r:.40}, no model has more than {limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        """A positive finite number."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_NUMBER:
            raise ModelError(f"{self.where}: {key} must be a positive number, got {value!r:.40}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool) and value not in (0, 1):
            raise ModelError(f"{self.where}: {key} must be true or false, got {value!r:.40}")
        return bool(value)

    def switch(self, switch: Switch) -> bool:
        """The value of a registry switch."""
        return self.flag(switch) if isinstance(switch, str) else switch

    def token(self, key: str) -> int | None:
        """A token id, None where the key is missing or holds something else."""
        value = self.record.get(key)
        return value if isinstance(value, int) else None

    def epsilon(self) -> float:
        """The epsilon of the norms."""
        if not self.arch.eps_keys:
            return 1e-5
        key = next((k for k in self.arch.eps_keys if self.record.get(k) is not None), self.arch.eps_keys[0])
        eps = self.record.get(key)
        if isinstance(eps, bool) or not isinstance(eps, float | int) or not 0 < eps < 1:
            raise ModelError(f"{self.where}: {key} must lie between 0 and 1, got {eps!r:.40}")
        return float(eps)

    def activation(self) -> str:
        """The activation function of the MLP, one of those that published models of the architecture have."""
        keys = self.arch.activation_keys
        key = next((k for k in keys if self.get(k) is not None), keys[-1])
        name = self.get(key)
        name = self.arch.activations[0] if name is None else name
        if isinstance(name, dict):
            name = name.get("name")
        if name not in self.arch.activations:
            known = ", ".join(self.arch.activations)
            raise UnsupportedModelError(
                f"{self.where}: {key} {name!r:.40} is not supported for {self.arch.name} ({known})"
            )
        return name

    def check_taken_for_granted(self) -> None:
        """Refuse values that the stock runtime would silently replace by others."""
        for key, value in self.arch.demanded:
            if self.get(key) != value:
                raise UnsupportedModelError(
                    f"{self.where}: {key} is {self.get(key)!r:.40}; {self.arch.name} runs with {value!r} only"
                )
        for key, value in self.arch.taken_for_granted:
            given = self.get(key)
            if given is not None and given != value:
                raise UnsupportedModelError(
                    f"{self.where}: {key} is {given!r:.40}; the runtime takes it for {value!r} in {self.arch.name}"
                )

    def windows(self, layers: int) -> tuple[tuple[bool, ...], int | None]:
        """Whether each layer has a sliding window, and its length in tokens; `(), None` where no window is set."""
        if self.record.get("sliding_window") is None:
            return (), None
        types = self._layer_types(layers)
        sliding = self._sliding(layers) if types is None else tuple(kind == "sliding_attention" for kind in types)
        if self.arch.window != "upper" and sliding != self._sliding(layers):
            raise UnsupportedModelError(
                f"{self.where}: layer_types do not follow the pattern that the runtime assumes for {self.arch.name}"
            )
        if self.arch.window == "none":
            return (), None
        return (sliding, self.positive("sliding_window")) if any(sliding) else ((), None)

    def _sliding(self, layers: int) -> tuple[bool, ...]:
        """Whether each layer has a sliding window, by all keys except `layer_types`."""
        if self.arch.window == "none":
            return (False,) * layers
        if self.arch.window in ("all", "switched"):
            return (self.arch.window == "all" or self.flag("use_sliding_window"),) * layers
        if self.arch.window == "upper":
            first = self.record.get("max_window_layers", layers) if self.flag("use_sliding_window") else layers
            if not isinstance(first, int):
                raise ModelError(f"{self.where}: max_window_layers must be an integer, got {first!r:.40}")
            return tuple(i >= first for i in range(layers))
        every = self.positive("sliding_window_pattern", default=self.arch.pattern)
        return tuple((i + 1) % every != 0 for i in range(layers))

    def _layer_types(self, layers: int) -> list[str] | None:
        types = self.record.get("layer_types")
        if types is None:
            return None
        known = ("sliding_attention", "full_attention")
        if not isinstance(types, list) or len(types) != layers or not all(t in known for t in types):
            raise ModelError(f"{self.where}: layer_types must name {layers} of {', '.join(known)}, got {types!r:.60}")
        return types
