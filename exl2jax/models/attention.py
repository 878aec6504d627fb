"""Causal attention with rotary positions, windows and soft caps, as a pure function of projections."""

import jax
import jax.numpy as jnp

from exl2jax.models.config import ModelConfig
from exl2jax.models.layers import soft_cap
from exl2jax.models.rope import rope_tables

QUERY_BLOCK = 128
"""Queries per attention block on the CPU. A block multiplies only with the keys before its end, which halves a causal
product, and its scores stay in cache between the products."""

WIDE_QUERY_BLOCK = 1024
"""Queries per attention block on other devices: each block is compiled separately, and small ones do not fill a GPU."""


def query_block() -> int:
    """Queries per attention block on the default device."""
    return QUERY_BLOCK if jax.default_backend() == "cpu" else WIDE_QUERY_BLOCK


def attend(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, *, sliding: bool = False) -> jax.Array:
    """Grouped-query attention `[B, T, heads * width of v's heads]`, softmax in float32.

    `q [B, T, heads, head_dim]`, `k` and `v [B, T, kv_heads, head_dim]`, heads of a group next to each other; `v` may
    have heads of another size. `sliding` picks the window and the rotary settings of sliding layers.
    """
    batch, length, heads, width = q.shape
    kv, groups = config.num_kv_heads, heads // config.num_kv_heads
    q, k = (rotate(config, x, tables(config, length, sliding=sliding)) for x in (q, k))
    window = config.window if sliding else None
    q = q * score_scale(config)
    # Heads in front and queries of one group in a row: plain products of matrices, one for each key-value head.
    q = q.reshape(batch, length, kv, groups, width).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    blocks, size = [], query_block()
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if window is None else max(0, start - window + 1)
        back = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        queries = q[:, :, :, start:stop].reshape(batch, kv, -1, width)
        scores = soft_cap(jnp.einsum("bhqd,bhkd->bhqk", queries, k[:, :, first:stop]), config.scales.attention_cap)
        scores = jnp.where(jnp.tile(seen, (groups, 1)), scores, -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        # Normalised after the product, which is narrower than the weights.
        values = jnp.einsum("bhqk,bhkd->bhqd", weights, v[:, :, first:stop]) / jnp.sum(weights, axis=-1, keepdims=True)
        blocks.append(values.reshape(batch, kv, groups, stop - start, -1))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)


def score_scale(config: ModelConfig) -> float:
    """The factor of the scores."""
    return config.head_dim**-0.5 if config.scales.attention is None else config.scales.attention


def tables(config: ModelConfig, length: int, *, sliding: bool) -> tuple[jax.Array, jax.Array] | None:
    """Cosines and sines of the first `length` positions, None where the layers have no rotary positions."""
    rope = config.local_rope if sliding else config.rope
    if rope is None:
        return None
    cos, sin = rope_tables(rope, rope.rotary_dim(config.head_dim), length)
    return jnp.asarray(cos), jnp.asarray(sin)


def rotate(config: ModelConfig, x: jax.Array, turns: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Rotary embedding of the first dimensions of `x [B, T, heads, head_dim]`, in pairs of neighbours or half apart.

    `turns` are the cosines and sines of the `T` positions.
    """
    if turns is None:
        return x
    cos, sin = (t[None, :, None, :] for t in turns)
    dim = 2 * cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    pairs = config.arch.rotary == "pairs"
    a, b = (turned[..., 0::2], turned[..., 1::2]) if pairs else jnp.split(turned, 2, axis=-1)
    new = (a * cos - b * sin, b * cos + a * sin)
    turned = jnp.stack(new, axis=-1).reshape(turned.shape) if pairs else jnp.concatenate(new, axis=-1)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
