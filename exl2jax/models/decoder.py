"""Flax modules of the decoder. One module is resident at a time; parameters are arguments, never closures.

A sublayer computes in three steps, so that a stage's linears can be swapped, stacked or measured between them:
`first_input(h)` is what the first stage reads, `second_input(outputs)` what the second reads, `residual(h, y)` the new
hidden state. Parameters are `{"norm": {"weight", "bias"?}, NAME: {"kernel" [K, N], "bias" [N]?}}` and further norms,
float32 or float16.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from exl2jax.models.attention import attend
from exl2jax.models.config import ModelConfig
from exl2jax.models.layers import ACTIVATIONS, Linear, Norm, soft_cap
from exl2jax.models.modules import ATTENTION_KIND, MLP_KIND, SLIDING_KIND

Outputs = Mapping[str, jax.Array]
Params = Mapping[str, Any]


def _norm(config: ModelConfig) -> Norm:
    return Norm(config.arch.norm, (config.hidden_size,), config.norm_eps, config.arch.norm_bias)


class Attention(nn.Module):
    """Causal grouped-query self-attention with its positions, norms and residual included."""

    config: ModelConfig
    sliding: bool = False

    def setup(self) -> None:
        """Declare the parameters."""
        c = self.config
        self.norm = _norm(c)
        self.q_proj = Linear(c.num_heads * c.head_dim, c.qkv_bias)
        self.k_proj = Linear(c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.v_proj = Linear(c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.o_proj = Linear(c.hidden_size, c.o_bias)
        if c.arch.norms.attention_post:
            self.post_norm = _norm(c)
        if c.head_norm:
            self.q_norm = Norm(c.head_norm, c.head_norm_shape(c.num_heads), c.norm_eps)
            self.k_norm = Norm(c.head_norm, c.head_norm_shape(c.num_kv_heads), c.norm_eps)

    def first_input(self, h: jax.Array) -> jax.Array:
        """What q, k, v read: `[B, T, D]`."""
        return self.norm(h)

    def first(self, x: jax.Array) -> dict[str, jax.Array]:
        """Outputs of q, k, v."""
        return {"q_proj": self.q_proj(x), "k_proj": self.k_proj(x), "v_proj": self.v_proj(x)}

    def heads(self, outputs: Outputs) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values by head, `[B, T, heads, head_dim]`, normalised where the architecture does it."""
        c = self.config
        heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        q, k, v = (outputs[name].reshape(*outputs[name].shape[:2], count, -1) for name, count in heads.items())
        if c.head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def second_input(self, outputs: Outputs) -> jax.Array:
        """What o reads: the attention result `[B, T, heads * head_dim]`."""
        return attend(self.config, *self.heads(outputs), sliding=self.sliding)

    def second_inputs(self, outputs: Outputs, last: Sequence[jax.Array]) -> list[jax.Array]:
        """`second_input` for several outputs of v: the weights of the values are computed once."""
        batch, length, _ = last[0].shape
        heads = [v.reshape(batch, length, self.config.num_kv_heads, 1, -1) for v in last]
        wide = jnp.concatenate(heads, axis=3).reshape(batch, length, -1)
        out = self.second_input({**outputs, "v_proj": wide})
        out = out.reshape(batch, length, self.config.num_heads, len(last), -1)
        return [out[:, :, :, i].reshape(batch, length, -1) for i in range(len(last))]

    def second(self, x: jax.Array) -> jax.Array:
        """Output of o."""
        return self.o_proj(x)

    def residual(self, h: jax.Array, y: jax.Array) -> jax.Array:
        """The new hidden state."""
        y = self.post_norm(y) if self.config.arch.norms.attention_post else y
        return h + _scaled(y, self.config.scales.residual)


class MLP(nn.Module):
    """MLP, gated or not, norms and residual included."""

    config: ModelConfig

    def setup(self) -> None:
        """Declare the parameters."""
        c = self.config
        self.norm = _norm(c)
        if c.arch.mlp[0]:
            self.gate_proj = Linear(c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.hidden_size, c.mlp_bias)
        if c.arch.norms.mlp_post:
            self.post_norm = _norm(c)

    def first_input(self, h: jax.Array) -> jax.Array:
        """What gate and up read: `[B, T, D]`."""
        return self.norm(h)

    def first(self, x: jax.Array) -> dict[str, jax.Array]:
        """Outputs of gate, where there is one, and up."""
        gate = {"gate_proj": self.gate_proj(x)} if self.config.arch.mlp[0] else {}
        return gate | {"up_proj": self.up_proj(x)}

    def second_input(self, outputs: Outputs) -> jax.Array:
        """What down reads: `[B, T, intermediate]`."""
        act, up = ACTIVATIONS[self.config.activation], outputs["up_proj"]
        return act(outputs["gate_proj"]) * up if self.config.arch.mlp[0] else act(up)

    def second_inputs(self, outputs: Outputs, last: Sequence[jax.Array]) -> list[jax.Array]:
        """`second_input` for several outputs of up."""
        return [self.second_input({**outputs, "up_proj": up}) for up in last]

    def second(self, x: jax.Array) -> jax.Array:
        """Output of down."""
        return self.down_proj(x)

    def residual(self, h: jax.Array, y: jax.Array) -> jax.Array:
        """The new hidden state."""
        y = self.post_norm(y) if self.config.arch.norms.mlp_post else y
        return h + _scaled(y, self.config.scales.residual)


class Head(nn.Module):
    """Final norm and language-model head."""

    config: ModelConfig

    def setup(self) -> None:
        """Declare the parameters."""
        self.norm = _norm(self.config)
        self.lm_head = Linear(self.config.vocab_size)

    def first_input(self, h: jax.Array) -> jax.Array:
        """What the head reads: `[B, T, D]`."""
        return self.norm(h)

    def __call__(self, h: jax.Array) -> jax.Array:
        """Logits `[B, T, vocab]`."""
        scales = self.config.scales
        return soft_cap(_scaled(self.lm_head(self.norm(h)), scales.logits), scales.logits_cap)


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * factor


class Trace(NamedTuple):
    """A sublayer's forward pass: the new hidden state and what each stage of linears read."""

    hidden: jax.Array
    first: jax.Array
    second: jax.Array


class Decoder(NamedTuple):
    """The pure functions of a model's modules, by kind. Hashable, so it can be static under `jit`."""

    config: ModelConfig

    def module(self, kind: str) -> Attention | MLP:
        """The Flax module of a kind."""
        if kind == MLP_KIND:
            return MLP(self.config)
        return Attention(self.config, sliding={ATTENTION_KIND: False, SLIDING_KIND: True}[kind])

    def first_input(self, kind: str, params: Params, h: jax.Array) -> jax.Array:
        """What the first stage reads."""
        return self._apply(kind, params, "first_input", h)

    def first(self, kind: str, params: Params, x: jax.Array) -> dict[str, jax.Array]:
        """Outputs of the first stage."""
        return self._apply(kind, params, "first", x)

    def heads(self, kind: str, params: Params, outputs: Outputs) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of an attention module by head."""
        return self._apply(kind, params, "heads", outputs)

    def second_input(self, kind: str, params: Params, outputs: Outputs) -> jax.Array:
        """What the second stage reads."""
        return self._apply(kind, params, "second_input", outputs)

    def second_inputs(self, kind: str, params: Params, outputs: Outputs, last: Sequence[jax.Array]) -> list[jax.Array]:
        """What the second stage reads for each of several outputs of the last linear of the first stage, `outputs`
        being those of the others; what they have in common is computed once.
        """  # noqa: D205
        return self._apply(kind, params, "second_inputs", outputs, last)

    def second(self, kind: str, params: Params, x: jax.Array) -> jax.Array:
        """Output of the second stage."""
        return self._apply(kind, params, "second", x)

    def residual(self, kind: str, params: Params, h: jax.Array, y: jax.Array) -> jax.Array:
        """The new hidden state."""
        return self._apply(kind, params, "residual", h, y)

    def forward(self, kind: str, params: Params, h: jax.Array) -> Trace:
        """Run a sublayer on `h [B, T, D]`."""
        first = self.first_input(kind, params, h)
        second = self.second_input(kind, params, self.first(kind, params, first))
        return Trace(self.residual(kind, params, h, self.second(kind, params, second)), first, second)

    def head_input(self, params: Params, h: jax.Array) -> jax.Array:
        """What the head reads."""
        return Head(self.config).apply({"params": params}, h, method="first_input")  # type: ignore[return-value]

    def logits(self, params: Params, h: jax.Array) -> jax.Array:
        """Logits of the final hidden state."""
        return Head(self.config).apply({"params": params}, h)  # type: ignore[return-value]

    def _apply(self, kind: str, params: Params, method: str, *args: Any) -> Any:
        return self.module(kind).apply({"params": params}, *args, method=method)


def build_decoder(config: ModelConfig) -> Decoder:
    """The decoder of a configuration."""
    return Decoder(config)
