"""Flax modules of the decoder. One module is resident at a time; parameters are arguments, never closures.

A sublayer computes in three steps, so that a stage's linears can be swapped, stacked or measured between them:
`first_input(h)` is what the first stage reads, `second_input(outputs)` what the second reads, `residual(h, y)` the new
hidden state. Parameters are `{"norm": {"weight"}, NAME: {"kernel" [K, N], "bias" [N]?}}`, all float32 or float16.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from exl2jax.models.config import ModelConfig
from exl2jax.models.modules import ATTENTION_KIND, MLP_KIND
from exl2jax.models.rope import rope_tables

QUERY_BLOCK = 128
"""Queries per attention block: a block looks only at the keys before its end, which halves a causal product, and its
scores stay in cache between the products."""

Outputs = Mapping[str, jax.Array]
Params = Mapping[str, Any]


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight."""

    size: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of `x [..., D]`."""
        weight = self.param("weight", nn.initializers.ones, (self.size,))
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * lax.rsqrt(variance + self.eps) * weight


class Linear(nn.Module):
    """`x W + b` with `W [K, N]`, computed in float32 whatever the stored dtype."""

    columns: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `x [..., K]` to `[..., N]`."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.columns))
        y = x @ kernel.astype(jnp.float32)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.columns,))
        return y


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions, norm and residual included."""

    config: ModelConfig

    def setup(self) -> None:
        """Declare the parameters."""
        c = self.config
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.q_proj = Linear(c.num_heads * c.head_dim, c.qkv_bias)
        self.k_proj = Linear(c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.v_proj = Linear(c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.o_proj = Linear(c.hidden_size, c.o_bias)

    def first_input(self, h: jax.Array) -> jax.Array:
        """What q, k, v read: `[B, T, D]`."""
        return self.norm(h)

    def first(self, x: jax.Array) -> dict[str, jax.Array]:
        """Outputs of q, k, v."""
        return {"q_proj": self.q_proj(x), "k_proj": self.k_proj(x), "v_proj": self.v_proj(x)}

    def second_input(self, outputs: Outputs) -> jax.Array:
        """What o reads: the attention result `[B, T, heads * head_dim]`."""
        return attend(self.config, outputs["q_proj"], outputs["k_proj"], outputs["v_proj"])

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
        return h + y


class MLP(nn.Module):
    """Gated MLP, norm and residual included."""

    config: ModelConfig

    def setup(self) -> None:
        """Declare the parameters."""
        c = self.config
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.gate_proj = Linear(c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.hidden_size, c.mlp_bias)

    def first_input(self, h: jax.Array) -> jax.Array:
        """What gate and up read: `[B, T, D]`."""
        return self.norm(h)

    def first(self, x: jax.Array) -> dict[str, jax.Array]:
        """Outputs of gate and up."""
        return {"gate_proj": self.gate_proj(x), "up_proj": self.up_proj(x)}

    def second_input(self, outputs: Outputs) -> jax.Array:
        """What down reads: `[B, T, intermediate]`."""
        return nn.silu(outputs["gate_proj"]) * outputs["up_proj"]

    def second_inputs(self, outputs: Outputs, last: Sequence[jax.Array]) -> list[jax.Array]:
        """`second_input` for several outputs of up."""
        return [self.second_input({**outputs, "up_proj": up}) for up in last]

    def second(self, x: jax.Array) -> jax.Array:
        """Output of down."""
        return self.down_proj(x)

    def residual(self, h: jax.Array, y: jax.Array) -> jax.Array:
        """The new hidden state."""
        return h + y


class Head(nn.Module):
    """Final norm and language-model head."""

    config: ModelConfig

    def setup(self) -> None:
        """Declare the parameters."""
        self.norm = RMSNorm(self.config.hidden_size, self.config.norm_eps)
        self.lm_head = Linear(self.config.vocab_size)

    def first_input(self, h: jax.Array) -> jax.Array:
        """What the head reads: `[B, T, D]`."""
        return self.norm(h)

    def __call__(self, h: jax.Array) -> jax.Array:
        """Logits `[B, T, vocab]`."""
        return self.lm_head(self.norm(h))


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
        return {ATTENTION_KIND: Attention, MLP_KIND: MLP}[kind](self.config)

    def first_input(self, kind: str, params: Params, h: jax.Array) -> jax.Array:
        """What the first stage reads."""
        return self._apply(kind, params, "first_input", h)

    def first(self, kind: str, params: Params, x: jax.Array) -> dict[str, jax.Array]:
        """Outputs of the first stage."""
        return self._apply(kind, params, "first", x)

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


def attend(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention over flat projections `[B, T, heads * head_dim]`, softmax in float32.

    `v` may have heads of another size than `q` and `k`; the result then has that head size.
    """
    batch, length, _ = q.shape
    kv, groups = config.num_kv_heads, config.num_heads // config.num_kv_heads
    cos, sin = (jnp.asarray(t) for t in rope_tables(config.rope, config.head_dim, length))
    q = rotate(q.reshape(batch, length, kv, groups, config.head_dim), cos, sin) * config.head_dim**-0.5
    k = rotate(k.reshape(batch, length, kv, 1, config.head_dim), cos, sin)
    # Heads in front and queries of one group in a row: plain products of matrices, one for each key-value head.
    q = q.transpose(0, 2, 3, 1, 4)
    k, v = (x.reshape(batch, length, kv, -1).transpose(0, 2, 1, 3) for x in (k, v))
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        queries = q[:, :, :, start:stop].reshape(batch, kv, -1, config.head_dim)
        causal = jnp.tile(jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :], (groups, 1))
        scores = jnp.where(causal, jnp.einsum("bhqd,bhkd->bhqk", queries, k[:, :, :stop]), -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        # Normalised after the product, which is narrower than the weights.
        values = jnp.einsum("bhqk,bhkd->bhqd", weights, v[:, :, :stop]) / jnp.sum(weights, axis=-1, keepdims=True)
        blocks.append(values.reshape(batch, kv, groups, stop - start, -1))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of `x [B, T, heads, groups, head_dim]`, pairs a half head apart."""
    cos, sin = cos[None, :, None, None, :], sin[None, :, None, None, :]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
