"""Streaming hidden states through one module: chunks of rows in, jitted passes, host arrays out.

States are `[R, T, D]` float32 in host memory; a chunk is a few rows, padded to a constant count so that one
compilation serves a whole run. Padded rows carry a zero mask and never reach a Hessian or an error.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from exl2jax.errors import NumericalError
from exl2jax.models import Decoder, Model, ModuleSpec
from exl2jax.ops import accumulate_hessian, relative_frobenius
from exl2jax.pipeline.devices import (
    on_all_devices,
    on_one_device,
    place_rows,
    row_devices,
    row_sharding,
    to_host,
)
from exl2jax.pipeline.token_weights import token_factors

CHUNK_TOKENS = 2048
"""Tokens of a chunk, at least one row: enough to keep every core busy, little enough to stay in cache."""

LOGITS = 1 << 24
"""Logits held at once, 64 MB of them: enough for efficient products, little beside the head itself."""


type ErrorOfRows = Callable[[jax.Array, jax.Array], jax.Array]
"""From an output and what it should be, `[B, T, D]`, the error of each row `[B]`; a function of a module, so that it is
compiled once."""


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
    """Result of a pass over all rows: new states, and for each group of linears its Hessian `X^T X / R` and the number
    of tokens that went into it.
    """  # noqa: D205

    states: np.ndarray
    hessians: list[jax.Array]
    tokens: list[int]


def collect(
    decoder: Decoder,
    spec: ModuleSpec,
    params: Any,
    states: np.ndarray,
    mask: np.ndarray | None,
    *,
    routed_only: bool = True,
    tables: np.ndarray | None = None,
) -> Collected:
    """Run a module over all rows, accumulating the Hessians of all its groups of linears.

    `mask [R, T]` is zero where a token is padding; such tokens leave no trace in the Hessians. Those of an expert come
    from the tokens routed to it, or from all unless `routed_only`; an expert that no token reached gets the identity.
    `tables [groups, CLASSES]` weigh the tokens of the Hessians (`exl2jax.pipeline.token_weights`).
    """
    mask, (params, tables) = full_mask(states, mask), on_all_devices((params, tables))
    out = np.empty_like(states)
    sums = on_all_devices(_zeros(spec))
    for chunk in row_chunks(states):
        h, m = chunk.take(states), chunk.take(mask)
        hidden, inputs, weights, factors = _trace_chunk(decoder, spec.kind, routed_only, params, tables, h, m)
        sums = _add_chunk(sums, inputs, weights, factors)
        chunk.put(out, hidden)
    sums = on_one_device(sums)
    tokens = [round(float(n)) for n in sums.tokens]
    hessians = [or_identity(h / len(states), n) for h, n in zip(sums.hessians, tokens, strict=True)]
    return Collected(out, hessians, tokens)


class Sums(NamedTuple):
    """Sums over the rows so far: `X^T X` and the number of tokens, for each group."""

    hessians: list[jax.Array]
    tokens: list[jax.Array]


def require_finite(states: np.ndarray, spec: ModuleSpec) -> None:
    """Raise `NumericalError` where a module's full-precision output is not finite."""
    if not np.isfinite(states).all():
        raise NumericalError(f"{spec.key}: the full-precision output holds NaN or infinity on this calibration data")


def or_identity(hessian: jax.Array, tokens: int) -> jax.Array:
    """The Hessian, or the identity where no token went into it."""
    return hessian if tokens else jnp.eye(hessian.shape[0], dtype=hessian.dtype)


def group_weights(routed: jax.Array | None, groups: int, mask: jax.Array) -> list[jax.Array]:
    """The weight of each token for each group, `[B, T]`: groups are experts in order, once per stage."""
    if routed is None:
        return [mask] * groups
    experts = routed.shape[-1]
    return [mask * routed[..., g % experts] for g in range(groups)]


def _zeros(spec: ModuleSpec) -> Sums:
    sizes = [group[0].rows for group in spec.groups]
    return Sums([jnp.zeros((k, k), jnp.float32) for k in sizes], [jnp.float32(0) for _ in sizes])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _trace_chunk(
    decoder: Decoder,
    kind: str,
    routed_only: bool,
    params: Any,
    tables: jax.Array | None,
    h: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array], list[jax.Array]]:
    """A chunk's new hidden states, what each group of linears read, which tokens reach it and their factors."""
    trace = decoder.forward(kind, params, h)
    inputs = [x for stage in trace.inputs for x in stage]
    weights = group_weights(decoder.routed(kind, params, h) if routed_only else None, len(inputs), mask)
    return trace.hidden, inputs, weights, token_factors(weights, tables, h, mask)


@partial(jax.jit, donate_argnums=0)
def _add_chunk(sums: Sums, inputs: list[jax.Array], weights: list[jax.Array], factors: list[jax.Array]) -> Sums:
    """The sums with a chunk's added; compiled apart from the forward pass, of which XLA would repeat parts here."""
    hessians = [
        accumulate_hessian(total, x * factor[:, :, None])
        for total, x, factor in zip(sums.hessians, inputs, factors, strict=True)
    ]
    return Sums(hessians, [total + jnp.sum(weight) for total, weight in zip(sums.tokens, weights, strict=True)])


def forward(decoder: Decoder, kind: str, params: Any, states: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Run a module over all rows; `out` may be `states` itself."""
    out, params = np.empty_like(states) if out is None else out, on_all_devices(params)
    for chunk in row_chunks(states):
        chunk.put(out, forward_chunk(decoder, kind, params, chunk.take(states)))
    return out


def relative_error(
    out: np.ndarray, ref: np.ndarray, mask: np.ndarray | None, of_rows: ErrorOfRows = relative_frobenius
) -> float:
    """Mean over rows of the error `of_rows`, padding apart; its default gives the stock converter's `rfn_error`."""
    mask, errors = full_mask(out, mask), []
    for chunk in row_chunks(out):
        arrays = (chunk.take(x) for x in (out, ref, mask))
        errors.append(chunk.read(row_errors(of_rows, *arrays)))
    return float(np.mean(np.concatenate(errors), dtype=np.float64))


@partial(jax.jit, static_argnums=(0, 1))
def forward_chunk(decoder: Decoder, kind: str, params: Any, h: jax.Array) -> jax.Array:
    """A module's output on a chunk `[B, T, D]`."""
    return decoder.forward(kind, params, h).hidden


@partial(jax.jit, static_argnums=0)
def row_errors(of_rows: ErrorOfRows, out: jax.Array, ref: jax.Array, weight: jax.Array) -> jax.Array:
    """Error of each row of a chunk `[B]`, tokens by their `weight [B, T]`."""
    return of_rows(out * weight[:, :, None], ref * weight[:, :, None])


@partial(jax.jit, static_argnums=0)
def head_logits(decoder: Decoder, params: Any, h: jax.Array) -> jax.Array:
    """Logits `[B, T, vocab]` of final hidden states."""
    return decoder.logits(params, h)
