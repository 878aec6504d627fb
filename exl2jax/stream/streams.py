"""Streams: values of all rows, on the device through a whole pass, or in host memory and brought up span by span.

`fold` takes streams through a program chunk by chunk. The sums that a program adds up stay on the device; results go
to other streams. A stream in host memory is double-buffered: the next chunk is on its way up before a chunk's result
is waited for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.stream.chunks import Spans, full_mask, row_spans, single_rows
from exl2jax.stream.devices import place_rows, row_sharding, to_host

SHARE = 0.5
"""Share of a device's free memory that streams may take; weights, Hessians and a chunk's activations need the rest."""


class Stream:
    """Values `[R, ...]` of all rows, cut into spans: arrays on the device (`resident`), or one in host memory."""

    def __init__(self, spans: Spans, parts: list[Any] | None, host: np.ndarray | None) -> None:
        """Bind spans to arrays by span, or to one array of all rows; use `of`, `like` or `empty`."""
        self.spans = spans
        self._parts, self._host = parts, host
        self._late: tuple[int, jax.Array] | None = None

    @classmethod
    def of(cls, values: np.ndarray, spans: Spans, *, resident: bool) -> Self:
        """The stream of `values`; in host memory they are written to in place, on the device left alone."""
        if not resident:
            return cls(spans, None, values)
        return cls(spans, [_upload(span.of(values)) for span in spans], None)

    @classmethod
    def empty(cls, spans: Spans, shape: tuple[int, ...], *, resident: bool) -> Self:
        """A stream to put values into; `shape` is that of one row."""
        if resident:
            return cls(spans, [None] * len(spans), None)
        return cls(spans, None, np.empty((spans[-1].stop, *shape), np.float32))

    @property
    def resident(self) -> bool:
        """Whether the values live on the device."""
        return self._parts is not None

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.spans[-1].stop

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self._host.shape[1:] if self._parts is None and self._host is not None else self.take(0).shape[1:]

    def like(self, *shape: int) -> "Stream":
        """An empty stream of the same rows, with values `[R, *shape]`."""
        return Stream.empty(self.spans, shape, resident=self.resident)

    def take(self, index: int) -> jax.Array:
        """The values of a span, padded, on the device."""
        if self._parts is not None:
            return self._parts[index]
        assert self._host is not None  # one of them always is there
        return _upload(self.spans[index].of(self._host))

    def put(self, index: int, value: jax.Array) -> None:
        """Replace the values of a span; `settle` once the last is put."""
        if self._parts is not None:
            self._parts[index] = value
            return
        self.settle()
        value.copy_to_host_async()
        self._late = index, value

    def settle(self) -> Self:
        """Wait for the value that was put last."""
        if self._late is not None:
            assert self._host is not None  # only values for the host come late
            index, value = self._late
            span, self._late = self.spans[index], None
            self._host[span.start : span.stop] = to_host(value)[: span.real]
        return self

    def rows(self, count: int | None = None) -> list[np.ndarray]:
        """The first `count` rows in host memory, not copied where they lie there already."""
        count = self.count if count is None else count
        if self._parts is None:
            assert self._host is not None  # one of them always is there
            return list(self._host[:count])
        spans = [(i, span) for i, span in enumerate(self.spans) if span.start < count]
        found = [row for i, span in spans for row in to_host(self._parts[i])[: span.real]]
        return found[:count]

    def array(self, count: int | None = None) -> np.ndarray:
        """The first `count` rows as one array in host memory, the stream's own if it lies there."""
        return np.stack(self.rows(count)) if self._host is None else self._host[:count]

    def parts(self) -> list[jax.Array]:
        """The arrays by span of a resident stream, to `read` them with others."""
        assert self._parts is not None  # small values always are resident
        return self._parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of a pass: their spans, which tokens count (`[R, T]`, always resident), where their states live."""

    spans: Spans
    mask: Stream
    resident: bool

    @classmethod
    def of(cls, mask: np.ndarray, width: int, *, single: bool = False, resident: bool = True) -> "Rows":
        """Rows of states with `width` features; `mask [R, T]` is 0 where a token is padding. `single`: one by one."""
        count, length = mask.shape
        spans = single_rows(count) if single else row_spans(count, length, width)
        mask = full_mask(mask.shape, mask)
        return cls(spans=spans, mask=Stream.of(mask, spans, resident=True), resident=resident)

    def place(self, values: np.ndarray) -> Stream:
        """States `[R, T, D]` of these rows, or of the first few of them, as a stream."""
        rows, length, width = values.shape
        spans = self.spans if rows == self.mask.count else row_spans(rows, length, width)
        return Stream.of(values, spans, resident=self.resident)


def fold[S](
    program: Callable[..., tuple[S, Sequence[jax.Array]]], total: S, streams: Sequence[Stream], into: Sequence[Stream]
) -> S:
    """Take the chunks of `streams` through `program(total, *chunk) -> total, values`; the values go `into` streams.

    A stream may be put into while it is read: its chunk is taken before.
    """
    count = len(streams[0].spans)
    coming = [stream.take(0) for stream in streams]
    for index in range(count):
        chunk, coming = coming, [stream.take(index + 1) for stream in streams] if index + 1 < count else []
        total, values = program(total, *chunk)
        for stream, value in zip(into, values, strict=True):
            stream.put(index, value)
    for stream in into:
        stream.settle()
    return total


def added(first: Stream, then: Stream) -> Stream:
    """The sum of two streams of the same rows, in place of the first."""
    fold(_sum, None, (first, then), (first,))
    return first


def _sum(total: None, a: jax.Array, b: jax.Array) -> tuple[None, tuple[jax.Array]]:
    return total, (_add(a, b),)


_add = jax.jit(jnp.add)


def read[T](tree: T) -> T:
    """Arrays on the device as NumPy arrays in host memory; all are on their way before the first is waited for."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return jax.tree.map(to_host, tree)


def device_budget(asked: float | None) -> int | None:
    """Bytes that streams may take on the device: those `asked` for in GB, else a share of its free memory.

    None is no limit: where the device's memory is the host's, streams are held there in any case.
    """
    if asked is not None:
        return int(asked * 1e9)
    stats = None if jax.default_backend() == "cpu" else jax.local_devices()[0].memory_stats()
    return None if not stats else int(SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))


def _upload(part: np.ndarray) -> jax.Array:
    sharding = row_sharding()
    return jax.device_put(part) if sharding is None else place_rows(part, sharding)


def whole(spans: Spans, parts: Sequence[Any]) -> np.ndarray:
    """Values of all rows from those by span, padding dropped."""
    return np.concatenate([part[: span.real] for part, span in zip(parts, spans, strict=True)])
