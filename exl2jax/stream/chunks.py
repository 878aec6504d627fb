"""Streaming hidden states through one module: chunks of rows in, jitted passes, host arrays out.

States are `[R, T, D]` float32 in host memory; a chunk is a few rows, padded to a constant count so that one
compilation serves a whole run. Padded rows carry a zero mask and never reach a Hessian or an error.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from exl2jax.stream.devices import place_rows, row_devices, row_sharding, to_host

CHUNK_TOKENS = 2048
"""Tokens of a chunk, at least one row: enough to keep every core busy, little enough to stay in cache."""

LOGITS = 1 << 24
"""Logits held at once, 64 MB of them: enough for efficient products, little beside the head itself."""


class Chunk(NamedTuple):
    """Rows `[start, stop)`, the padded count they are brought to, and how they lie on several devices."""

    start: int
    stop: int
    rows: int
    sharding: NamedSharding | None = None

    def take(self, states: np.ndarray) -> np.ndarray | jax.Array:
        """These rows of `states`, padded with zeros; on their devices where there are several."""
        part = states[self.start : self.stop]
        missing = self.rows - len(part)
        part = np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)) if missing else part
        return part if self.sharding is None else place_rows(part, self.sharding)

    def read(self, value: jax.Array) -> np.ndarray:
        """The result `[rows, ...]` of these rows, padding dropped."""
        return to_host(value)[: self.stop - self.start]

    def put(self, states: np.ndarray, value: jax.Array) -> None:
        """Write the result of these rows back into `states`."""
        states[self.start : self.stop] = self.read(value)


def chunks(rows: int, length: int) -> list[Chunk]:
    """Cut `rows` rows of `length` tokens into chunks of equal (padded) size, the same share for every device."""
    return _cut(rows, rows_at_once(rows, length, row_devices()))


def rows_at_once(rows: int, length: int, devices: int = 1) -> int:
    """How many rows of `length` tokens a chunk takes, of `rows` that all chunks share evenly."""
    count = -(-rows // (devices * max(1, CHUNK_TOKENS // length)))
    return -(-rows // (count * devices)) * devices


def single_rows(rows: int) -> list[Chunk]:
    """Rows one by one, as many at a time as there are devices."""
    return _cut(rows, row_devices())


def _cut(rows: int, size: int) -> list[Chunk]:
    sharding, devices = row_sharding(), row_devices()
    padded = -(-size // devices) * devices
    return [Chunk(start, min(start + size, rows), padded, sharding) for start in range(0, rows, size)]


def row_chunks(states: np.ndarray) -> Iterator[Chunk]:
    """The chunks of a `[R, T, ...]` array."""
    yield from chunks(states.shape[0], states.shape[1])


def token_chunks(tokens: int, vocab: int) -> list[Chunk]:
    """Cut `tokens` tokens, rows end to end, into chunks whose logits are `LOGITS` at most: the same on any devices."""
    count = -(-tokens // max(1, LOGITS // vocab))
    return _cut(tokens, -(-tokens // count))


def full_mask(states: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """`mask [R, T]` as float32, ones where there is none."""
    return np.ones(states.shape[:2], np.float32) if mask is None else mask.astype(np.float32)
