"""Attention one token at a time over the keys and values of the tokens before it, for sampling."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from exl2jax.models.config import ModelConfig
from exl2jax.models.decoder import Decoder, rotate
from exl2jax.models.modules import ATTENTION_KIND
from exl2jax.models.rope import rope_tables

CACHED_ARCHITECTURES = ("LlamaForCausalLM",)
"""Architectures whose attention `next_hidden` knows; others must not be sampled from by guesswork."""


class KeyValues(NamedTuple):
    """Rotated keys and values of one attention module, `[B, kv_heads, span, head_dim]` float32, zero where unseen."""

    keys: jax.Array
    values: jax.Array


def empty_cache(config: ModelConfig, batch: int, span: int) -> KeyValues:
    """A cache with room for `span` tokens."""
    zeros = jnp.zeros((batch, config.num_kv_heads, span, config.head_dim), jnp.float32)
    return KeyValues(zeros, zeros.copy())


def widened(cache: KeyValues, span: int) -> KeyValues:
    """The cache with room for `span` tokens."""
    more = span - cache.keys.shape[2]
    return KeyValues(*(jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in cache))


def next_hidden(
    decoder: Decoder, params: Any, h: jax.Array, cache: KeyValues, position: jax.Array, length: int
) -> tuple[jax.Array, KeyValues]:
    """Run an attention module on the token at `position`, `h [B, 1, D]`, of rows that will be `length` tokens long.

    Gives what `Decoder.forward` gives at that position of the whole row, and the cache with the token added.
    """
    outputs = decoder.first(ATTENTION_KIND, params, decoder.first_input(ATTENTION_KIND, params, h))
    x, cache = _attend(decoder.config, outputs["q_proj"], outputs["k_proj"], outputs["v_proj"], cache, position, length)
    return decoder.residual(ATTENTION_KIND, params, h, decoder.second(ATTENTION_KIND, params, x)), cache


def _attend(
    config: ModelConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KeyValues,
    position: jax.Array,
    length: int,
) -> tuple[jax.Array, KeyValues]:
    """Attention of one query per row, `[B, 1, heads * head_dim]`, over the cache and the token itself."""
    batch, heads, width = q.shape[0], config.num_kv_heads, config.head_dim
    tables = (jnp.asarray(t) for t in rope_tables(config.rope, width, length))
    cos, sin = (jax.lax.dynamic_slice_in_dim(t, position, 1) for t in tables)
    q = rotate(q.reshape(batch, 1, heads, -1, width), cos, sin)[:, 0]
    k = rotate(k.reshape(batch, 1, heads, 1, width), cos, sin)[:, 0]
    at = (0, 0, position, 0)
    cache = KeyValues(
        jax.lax.dynamic_update_slice(cache.keys, k, at),
        jax.lax.dynamic_update_slice(cache.values, v.reshape(batch, heads, 1, width), at),
    )
    scores = jnp.einsum("bhgd,bhkd->bhgk", q, cache.keys) * width**-0.5
    seen = jnp.arange(cache.keys.shape[2]) <= position
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhgk,bhkd->bhgd", weights, cache.values).reshape(batch, 1, -1), cache
