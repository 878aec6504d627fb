"""A model a few tokens at a time: modules kept in memory as far as they fit, over caches of keys and values."""

import logging
from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Decoder, Model, ModelConfig, module_specs
from exl2jax.models.kv_cache import KeyValues, Turns, empty_cache, next_hidden
from exl2jax.models.modules import ATTENTION_KINDS
from exl2jax.stream.blocks import Block, Piece
from exl2jax.stream.forward import forward_chunk

log = logging.getLogger(__name__)

RESIDENT_BYTES = 8 << 30
"""Parameters kept in memory between tokens; those beyond are read again for every token."""

type Walk = Callable[[], Iterator[Block]]
"""One pass over the model: each module in order, with its parameters."""


class Embeddings(NamedTuple):
    """The table of tokens, and what is added to it at each position, if anything is."""

    tokens: np.ndarray
    positions: np.ndarray | None

    def at(self, ids: np.ndarray, position: int) -> np.ndarray:
        """Hidden states `[B, T, D]` of the tokens `ids [B, T]`, the first of them at `position`."""
        hidden = self.tokens[ids]
        if self.positions is None:
            return hidden
        return hidden + self.positions[position : position + ids.shape[1]]


def resident_walk(model: Model) -> Walk:
    """Passes over the model's modules, as many of them resident as fit."""
    specs = module_specs(model.config)
    kept: list[Block] = []
    room = RESIDENT_BYTES
    for spec in specs:
        room -= 4 * spec.weights
        if room < 0:
            log.warning("memory: %d of %d modules do not fit and are read for every token",
                        len(specs) - len(kept), len(specs))  # fmt: skip
            break
        kept.append(Block(spec, in_single(model.module_params(spec))))

    def walk() -> Iterator[Block]:
        for index, spec in enumerate(specs):
            yield kept[index] if index < len(kept) else Block.of(model, spec)

    return walk


def in_single(params: Any) -> Any:
    """Parameters in float32, once: a dequantized weight would be widened again for every token."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def empty_caches(config: ModelConfig, batch: int, span: int) -> list[KeyValues]:
    """A cache with room for `span` tokens for every attention module."""
    count = sum(spec.kind in ATTENTION_KINDS for spec in module_specs(config))
    return [empty_cache(config, batch, span) for _ in range(count)]


def step_tokens(
    decoder: Decoder, walk: Walk, hidden: jax.Array, caches: list[KeyValues], position: int, turns: Turns
) -> jax.Array:
    """Final hidden states `[B, T, D]` of the tokens from `position` on, whose embeddings are `hidden [B, T, D]`.

    The entries of `caches` are replaced by ones that hold these tokens too.
    """
    module = 0
    for block in walk():
        if block.spec.kind not in ATTENTION_KINDS:
            hidden = reduce(jnp.add, map(partial(_other_step, h=hidden), block.pieces(decoder)))
            continue
        hidden, caches[module] = _attention_step(
            decoder.module(block.spec), block.params, hidden, caches[module], jnp.int32(position), turns
        )
        module += 1
    return hidden


_attention_step = jax.jit(next_hidden, static_argnames="module", donate_argnames="cache")


def _other_step(piece: Piece, h: jax.Array) -> jax.Array:
    return forward_chunk(piece.module, piece.params, h)
