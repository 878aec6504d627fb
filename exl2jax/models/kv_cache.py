"""Attention of a few tokens at a time over the keys and values of the tokens before them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from exl2jax.models.attention import rotate, score_scale, tables
from exl2jax.models.config import ModelConfig
from exl2jax.models.decoder import Module
from exl2jax.models.layers import soft_cap
from exl2jax.models.modules import SLIDING_KINDS


class KeyValues(NamedTuple):
    """Rotated keys and values of one attention module, `[B, kv_heads, span, head_dim]` float32, zero where empty."""

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


class Turns(NamedTuple):
    """Cosines and sines by position of full and of sliding layers, None for layers without rotary positions."""

    full: tuple[jax.Array, jax.Array] | None
    sliding: tuple[jax.Array, jax.Array] | None


def turns(config: ModelConfig, length: int, room: int = 0) -> Turns:
    """The rotary tables of rows that will be `length` tokens long, with zeros up to `room` positions."""

    def padded(table: jax.Array) -> jax.Array:
        return jnp.pad(table, ((0, max(0, room - length)), (0, 0)))

    return Turns(*(jax.tree.map(padded, tables(config, length, sliding=sliding)) for sliding in (False, True)))


def next_hidden(
    module: Module, params: Any, h: jax.Array, cache: KeyValues, position: jax.Array, turns: Turns
) -> tuple[jax.Array, KeyValues]:
    """Run an attention module on the tokens from `position` on, `h [B, T, D]`.

    Gives what `Module.forward` gives at these positions of the whole row, and the cache with the tokens added. The
    cache and the tables must have room for all of them.
    """
    outputs = module.linears(0, params, module.inputs(0, params, h, {}))
    heads = module.heads(params, outputs)
    x, cache = _attend(module.config, *heads, cache, position, turns, sliding=module.kind in SLIDING_KINDS)
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
    turns: Turns,
    *,
    sliding: bool,
) -> tuple[jax.Array, KeyValues]:
    """Attention of `T` queries per row, `[B, T, heads * head_dim]`, over the cache and the tokens themselves."""
    batch, count, heads = *q.shape[:2], config.num_kv_heads
    here = turns.sliding if sliding else turns.full
    if here is not None:
        here = jax.tree.map(lambda t: jax.lax.dynamic_slice_in_dim(t, position, count), here)
    q, k = (rotate(config, x, here) for x in (q, k))
    at = (0, 0, position, 0)
    cache = KeyValues(
        jax.lax.dynamic_update_slice(cache.keys, k.transpose(0, 2, 1, 3), at),
        jax.lax.dynamic_update_slice(cache.values, v.transpose(0, 2, 1, 3), at),
    )
    q = q.reshape(batch, count, heads, -1, config.head_dim).transpose(0, 2, 3, 1, 4) * score_scale(config)
    groups = q.shape[2]
    q = q.reshape(batch, heads, groups * count, config.head_dim)
    scores = soft_cap(jnp.einsum("bhgd,bhkd->bhgk", q, cache.keys), config.scales.attention_cap)
    back = (position + jnp.arange(count))[:, None] - jnp.arange(cache.keys.shape[2])
    seen = back >= 0 if config.window is None or not sliding else (back >= 0) & (back < config.window)
    weights = jax.nn.softmax(jnp.where(jnp.tile(seen, (groups, 1)), scores, -jnp.inf), axis=-1)
    values = jnp.einsum("bhgk,bhkd->bhgd", weights, cache.values).reshape(batch, heads, groups, count, -1)
    return values.transpose(0, 3, 1, 2, 4).reshape(batch, count, -1), cache
