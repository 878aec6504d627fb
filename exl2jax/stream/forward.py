"""Hidden states through one module: the embedding, the forward pass, and the error of its output."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from exl2jax.errors import NumericalError
from exl2jax.models import Decoder, Model, ModuleSpec
from exl2jax.ops import relative_frobenius
from exl2jax.stream.chunks import full_mask, row_chunks
from exl2jax.stream.devices import on_all_devices

type ErrorOfRows = Callable[[jax.Array, jax.Array], jax.Array]
"""From an output and what it should be, `[B, T, D]`, the error of each row `[B]`; a function of a module, so that it is
compiled once."""


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


def require_finite(states: np.ndarray, spec: ModuleSpec) -> None:
    """Raise `NumericalError` where a module's full-precision output is not finite."""
    if not np.isfinite(states).all():
        raise NumericalError(f"{spec.key}: the full-precision output holds NaN or infinity on this calibration data")


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
