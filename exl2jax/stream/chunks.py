"""Rows cut into spans: a pass takes a few rows at a time, padded to a constant count, so that one compilation serves.

Padded rows carry a zero mask and never reach a Hessian or an error.
"""

from typing import NamedTuple

import jax
import numpy as np

from exl2jax.stream.devices import row_devices

CHUNK_TOKENS = 2048
"""Tokens of a chunk on the CPU, at least one row: enough to keep every core busy, little enough to stay in cache."""

CHUNK_BYTES = 128 << 20
"""Bytes of a chunk's hidden states on a GPU: few calls, and a chunk's activations stay below some gigabytes."""

LOGITS = 1 << 24
"""Logits held at once, 64 MB of them: enough for efficient products, little beside the head itself."""


class Span(NamedTuple):
    """Rows `[start, stop)`, and the count that they are padded to."""

    start: int
    stop: int
    rows: int

    def of(self, values: np.ndarray) -> np.ndarray:
        """These rows of `values [R, ...]`, padded with zeros."""
        part = values[self.start : self.stop]
        missing = self.rows - len(part)
        return np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)) if missing else part

    @property
    def real(self) -> int:
        """How many rows there are without padding."""
        return self.stop - self.start


type Spans = tuple[Span, ...]


class Chunk(NamedTuple):
    """The states `[B, T, D]` of a span, which tokens count `[B, T]`, and the full-precision states beside them."""

    states: jax.Array
    mask: jax.Array
    reference: jax.Array | None = None


def row_spans(rows: int, length: int, width: int) -> Spans:
    """Cut `rows` rows of `length` tokens of `width` features into spans of equal (padded) size on every device."""
    return _cut(rows, rows_at_once(rows, length, width, row_devices()))


def rows_at_once(rows: int, length: int, width: int, devices: int = 1) -> int:
    """How many rows a chunk takes, of `rows` that all chunks share evenly."""
    count = -(-rows // (devices * max(1, chunk_tokens(width) // length)))
    return -(-rows // (count * devices)) * devices


def chunk_tokens(width: int) -> int:
    """Tokens of a chunk of states with `width` float32 features: a constant on the CPU, by their bytes elsewhere."""
    return CHUNK_TOKENS if jax.default_backend() == "cpu" else max(CHUNK_TOKENS, CHUNK_BYTES // (4 * width))


def single_rows(rows: int) -> Spans:
    """Rows one by one, as many at a time as there are devices."""
    return _cut(rows, row_devices())


def token_spans(tokens: int, vocab: int) -> Spans:
    """Cut `tokens` tokens, rows end to end, into spans whose logits are `LOGITS` at most: the same on any devices."""
    count = -(-tokens // max(1, LOGITS // vocab))
    return _cut(tokens, -(-tokens // count))


def _cut(rows: int, size: int) -> Spans:
    devices = row_devices()
    padded = -(-size // devices) * devices
    return tuple(Span(start, min(start + size, rows), padded) for start in range(0, rows, size))


def full_mask(shape: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray:
    """`mask [R, T]` as float32, ones where there is none; `shape` begins with `[R, T]`."""
    return np.ones(shape[:2], np.float32) if mask is None else mask.astype(np.float32)
