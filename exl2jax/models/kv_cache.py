"""Attention one token at a time over the keys and values of the tokens before it, for sampling."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from exl2jax.models.attention import rotate, score_scale, tables
from exl2jax.models.config import ModelConfig
from exl2jax.models.decoder import Module
from exl2jax.models.layers import soft_cap
from exl2jax.models.modules import SLIDING_KINDS


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
    module: Module, params: Any, h: jax.Array, cache: KeyValues, position: jax.Array, length: int
) -> tuple[jax.Array, KeyValues]:
    """Run an attention module on the token at `position`, `h [B, 1, D]`, of rows that will be `length` tokens long.

    Gives what `Module.forward` gives at that position of the whole row, and the cache with the token added.
    """
    outputs = module.linears(0, params, module.inputs(0, params, h, {}))
    heads = module.heads(params, outputs)
    x, cache = _attend(module.config, *heads, cache, position, length, sliding=module.kind in SLIDING_KINDS)
    _, *others = module.inputs(1, params, h, outputs)
    outputs |= module.linears(1, params, (x, *others))
    return module.output(params, h, outputs), cache


def _attend(
    config: ModelConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KeyValues,
    position: jax.Array,
    length: int,
    *,
    sliding: bool,
) -> tuple[jax.Array, KeyValues]:
    """Attention of one query per row, `[B, 1, heads * head_dim]`, over the cache and the token itself."""
    batch, heads = q.shape[0], config.num_kv_heads
    turns = tables(config, length, sliding=sliding)
    if turns is not None:
        turns = jax.tree.map(lambda t: jax.lax.dynamic_slice_in_dim(t, position, 1), turns)
    q, k = (rotate(config, x, turns) for x in (q, k))
    at = (0, 0, position, 0)
    cache = KeyValues(
        jax.lax.dynamic_update_slice(cache.keys, k.transpose(0, 2, 1, 3), at),
        jax.lax.dynamic_update_slice(cache.values, v.transpose(0, 2, 1, 3), at),
    )
    q = q.reshape(batch, heads, -1, config.head_dim) * score_scale(config)
    scores = soft_cap(jnp.einsum("bhgd,bhkd->bhgk", q, cache.keys), config.scales.attention_cap)
    back = position - jnp.arange(cache.keys.shape[2])
    seen = back >= 0 if config.window is None or not sliding else (back >= 0) & (back < config.window)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhgk,bhkd->bhgd", weights, cache.values).reshape(batch, 1, -1), cache
