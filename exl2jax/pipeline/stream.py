"""Streaming hidden states through one module: chunks of rows in, jitted passes, host arrays out.

States are `[R, T, D]` float32 in host memory; a chunk is a few rows, padded to a constant count so that one
compilation serves a whole run. Padded rows carry a zero mask and never reach a Hessian or an error.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.models import Decoder, Model
from exl2jax.ops import accumulate_hessian, relative_frobenius

CHUNK_TOKENS = 2048
"""Tokens of a chunk, at least one row: enough to keep every core busy, little enough to stay in cache."""


class Chunk(NamedTuple):
    """Rows `[start, stop)` and the padded count they are brought to."""

    start: int
    stop: int
    rows: int

    def take(self, states: np.ndarray) -> np.ndarray:
        """These rows of `states`, padded with zeros."""
        part = states[self.start : self.stop]
        missing = self.rows - len(part)
        return np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)) if missing else part

    def put(self, states: np.ndarray, value: jax.Array) -> None:
        """Write the result of these rows back into `states`."""
        states[self.start : self.stop] = np.asarray(value)[: self.stop - self.start]


def chunks(rows: int, length: int) -> list[Chunk]:
    """Cut `rows` rows of `length` tokens into chunks of equal (padded) size."""
    count = -(-rows // max(1, CHUNK_TOKENS // length))
    size = -(-rows // count)
    return [Chunk(start, min(start + size, rows), size) for start in range(0, rows, size)]


def row_chunks(states: np.ndarray) -> Iterator[Chunk]:
    """The chunks of a `[R, T, ...]` array."""
    yield from chunks(states.shape[0], states.shape[1])


def full_mask(states: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """`mask [R, T]` as float32, ones where there is none."""
    return np.ones(states.shape[:2], np.float32) if mask is None else mask.astype(np.float32)


def embed(model: Model, input_ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """Hidden states `[R, T, D]` float32 of token rows; rows of negative ids become noise with the table's spread."""
    table = model.embedding()
    states = table[np.maximum(input_ids, 0)]
    noise = np.flatnonzero((input_ids < 0).any(axis=1))
    if len(noise):
        generator = np.random.default_rng([seed, 0x6E6F6973])
        shape = (len(noise), *states.shape[1:])
        states[noise] = generator.standard_normal(shape, dtype=np.float32) * table.std()
    positions = model.positions(states.shape[1])
    return states if positions is None else states + positions


class Collected(NamedTuple):
    """Result of a pass over all rows: new states and the Hessian sums of both stages."""

    states: np.ndarray
    first: jax.Array
    second: jax.Array


def collect(decoder: Decoder, kind: str, params: Any, states: np.ndarray, mask: np.ndarray | None) -> Collected:
    """Run a module over all rows, accumulating `X^T X / R` of both stages.

    `mask [R, T]` is zero where a token is padding; such tokens leave no trace in the Hessians.
    """
    rows = states.shape[0]
    mask = full_mask(states, mask)
    out = np.empty_like(states)
    first = second = None
    for chunk in row_chunks(states):
        h, m = chunk.take(states), chunk.take(mask)
        if first is None or second is None:
            first, second = _empty_hessians(decoder, kind, params, h)
        hidden, first, second = _collect_chunk(decoder, kind, params, h, m, first, second)
        chunk.put(out, hidden)
    assert first is not None and second is not None  # chunks of a non-empty array are never empty
    return Collected(out, first / rows, second / rows)


def forward(decoder: Decoder, kind: str, params: Any, states: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Run a module over all rows; `out` may be `states` itself."""
    out = np.empty_like(states) if out is None else out
    for chunk in row_chunks(states):
        chunk.put(out, _forward_chunk(decoder, kind, params, chunk.take(states)))
    return out


def relative_error(out: np.ndarray, ref: np.ndarray, mask: np.ndarray | None) -> float:
    """Mean over rows of `||out - ref|| / ||ref||`, the stock converter's `rfn_error` of a module, padding apart."""
    mask = full_mask(out, mask)
    errors = []
    for c in row_chunks(out):
        weight = mask[c.start : c.stop, :, None]
        errors.append(np.asarray(_row_errors(out[c.start : c.stop] * weight, ref[c.start : c.stop] * weight)))
    return float(np.mean(np.concatenate(errors), dtype=np.float64))


def _empty_hessians(decoder: Decoder, kind: str, params: Any, h: np.ndarray) -> tuple[jax.Array, jax.Array]:
    trace = jax.eval_shape(partial(decoder.forward, kind), params, h)
    sizes = (trace.first.shape[-1], trace.second.shape[-1])
    first, second = (jnp.zeros((k, k), jnp.float32) for k in sizes)
    return first, second


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(5, 6))
def _collect_chunk(
    decoder: Decoder, kind: str, params: Any, h: jax.Array, mask: jax.Array, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    trace = decoder.forward(kind, params, h)
    weight = mask[:, :, None]
    return (
        trace.hidden,
        accumulate_hessian(first, trace.first * weight),
        accumulate_hessian(second, trace.second * weight),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _forward_chunk(decoder: Decoder, kind: str, params: Any, h: jax.Array) -> jax.Array:
    return decoder.forward(kind, params, h).hidden


_row_errors = jax.jit(relative_frobenius)


@partial(jax.jit, static_argnums=0)
def head_logits(decoder: Decoder, params: Any, h: jax.Array) -> jax.Array:
    """Logits `[B, T, vocab]` of final hidden states."""
    return decoder.logits(params, h)
