"""Hidden states through one module: the embedding, the forward pass, and the error of its output."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.errors import NumericalError
from exl2jax.models import Decoder, Model, Module, ModuleSpec
from exl2jax.ops import relative_frobenius
from exl2jax.stream.chunks import Spans
from exl2jax.stream.devices import on_all_devices
from exl2jax.stream.streams import Rows, Stream, fold, read, whole

type ErrorOfRows = Callable[[jax.Array, jax.Array], jax.Array]
"""From an output and its reference, `[B, T, D]`, the error of each row `[B]`; a function of a Python module, so that it
is compiled once."""


class Tally(NamedTuple):
    """Over the chunks so far: whether every state is finite, the largest state and the largest output of a linear."""

    finite: Any
    state: Any
    linear: Any

    def with_states(self, states: jax.Array) -> "Tally":
        """With the states of a chunk."""
        finite = self.finite & jnp.all(jnp.isfinite(states))
        return self._replace(finite=finite, state=jnp.maximum(self.state, jnp.max(jnp.abs(states))))

    def with_linears(self, outputs: Mapping[str, jax.Array]) -> "Tally":
        """With the outputs of linears on a chunk, by name."""
        return self._replace(linear=jnp.maximum(self.linear, largest_of(outputs)))

    def joined(self, then: "Tally") -> "Tally":
        """Together with the tally of another piece."""
        return Tally(self.finite & then.finite, *(jnp.maximum(a, b) for a, b in zip(self[1:], then[1:], strict=True)))


def largest_of(outputs: Mapping[str, jax.Array]) -> jax.Array:
    """The largest absolute value of some arrays, 0 where there are none."""
    return jnp.max(jnp.stack([jnp.zeros(()), *(jnp.max(jnp.abs(y)) for y in outputs.values())]))


START = Tally(np.bool_(True), np.float32(0), np.float32(0))
"""The tally before the first chunk."""


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


def require_finite(tally: Tally, spec: ModuleSpec, stream: str = "full-precision") -> None:
    """Raise `NumericalError` where a module's output is not finite; `tally` has been read."""
    if not tally.finite:
        raise NumericalError(f"{spec.key}: the {stream} output holds NaN or infinity on this calibration data")


def forward(module: Module, params: Any, states: Stream, into: Stream) -> Tally:
    """Run a module over all rows; `into` may be `states` itself. The tally stays on the device."""
    return fold(partial(_forward_chunk, module, on_all_devices(params)), START, (states,), (into,))


@partial(jax.jit, static_argnames="module")
def _forward_chunk(module: Module, params: Any, tally: Tally, h: jax.Array) -> tuple[Tally, tuple[jax.Array]]:
    trace = module.forward(params, h)
    return tally.with_states(trace.hidden).with_linears(trace.outputs), (trace.hidden,)


@partial(jax.jit, static_argnames="module")
def forward_chunk(module: Module, params: Any, h: jax.Array) -> jax.Array:
    """A module's output on a chunk `[B, T, D]`."""
    return module.forward(params, h).hidden


def errors_by_row(rows: Rows, out: Stream, ref: Stream, of_rows: ErrorOfRows = relative_frobenius) -> Stream:
    """The error `of_rows` of each row `[R]`, padding apart; its default gives the stock converter's `rfn_error`."""
    errors = Stream.empty(rows.spans, (), resident=True)
    fold(partial(_row_errors, of_rows), None, (out, ref, rows.mask), (errors,))
    return errors


def mean_of_rows(spans: Spans, parts: Sequence[Any]) -> float:
    """The mean over rows of values by span, which have been read; padding apart."""
    return float(np.mean(whole(spans, parts), dtype=np.float64))


def relative_error(
    out: np.ndarray, ref: np.ndarray, mask: np.ndarray | None, of_rows: ErrorOfRows = relative_frobenius
) -> float:
    """Mean over rows of the error of states in host memory `[R, T, D]`."""
    rows = Rows.of(np.ones(out.shape[:2]) if mask is None else mask, out.shape[-1], resident=False)
    errors = errors_by_row(rows, rows.place(out), rows.place(ref), of_rows)
    return mean_of_rows(rows.spans, read(errors.parts()))


def _row_errors(
    of_rows: ErrorOfRows, total: None, out: jax.Array, ref: jax.Array, mask: jax.Array
) -> tuple[None, tuple[jax.Array]]:
    return total, (row_errors(of_rows, out, ref, mask),)


@partial(jax.jit, static_argnames="of_rows")
def row_errors(of_rows: ErrorOfRows, out: jax.Array, ref: jax.Array, weight: jax.Array) -> jax.Array:
    """Error of each row of a chunk `[B]`, tokens by their `weight [B, T]`."""
    return of_rows(out * weight[:, :, None], ref * weight[:, :, None])


@partial(jax.jit, static_argnames="decoder")
def head_logits(decoder: Decoder, params: Any, h: jax.Array) -> jax.Array:
    """Logits `[B, T, vocab]` of final hidden states."""
    return decoder.logits(params, h)
