"""The form of a pass as a checkpointed scan, and the token rows that the passes of a conversion go over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from exl2jax.calibration import CalibrationRows
from exl2jax.conversion.context import Context
from exl2jax.models import LinearSpec, ModuleSpec
from exl2jax.stream.chunks import full_mask
from exl2jax.stream.forward import embed
from exl2jax.stream.scan import STATES, Carry, HostCarry, streams_by
from exl2jax.stream.streams import Rows, Stream, device_budget


class Codec[O](NamedTuple):
    """The form of a pass's outputs on disk; `read(count)` returns the first `count`."""

    write: Callable[[Sequence[O]], None]
    read: Callable[[int], list[O]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass[O]:
    """A pass over modules: its step, its modules, its first carry, the codec of its outputs, the placing of streams.

    `last` names the streams that are read after the last module.
    """

    name: str
    step: Callable[[Carry, Any], tuple[Carry, O]]
    specs: Sequence[ModuleSpec | LinearSpec]
    start: Callable[[], HostCarry]
    codec: Codec[O]
    place: Callable[[np.ndarray], Stream]
    last: Sequence[str] = ()
    describe: Callable[[Any, O], str] = lambda spec, _: spec.key

    def run(self, context: Context) -> tuple[Carry, list[O]]:
        """Run the step on every module, from the last checkpoint on, and write all outputs."""
        carry, outputs = context.scan(
            self.name,
            self.step,
            self.start,
            self.specs,
            form=streams_by(self.place, self.last),
            describe=self.describe,
            write=self.codec.write,
            read=self.codec.read,
        )
        self.codec.write(outputs)
        return carry, outputs


class TokenRows(NamedTuple):
    """Token rows of a pass `[R, T]`, and their mask: 0 for padding, 1 for tokens that count."""

    input_ids: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(cls, rows: CalibrationRows) -> "TokenRows":
        """All calibration rows."""
        return cls(rows.input_ids, full_mask(rows.input_ids.shape, rows.attention_mask))


def spread_rows(rows: CalibrationRows, most: int) -> TokenRows:
    """At most so many of the calibration rows, spread evenly over them and so over their domains."""
    count = min(most, len(rows.input_ids))
    picked = (2 * np.arange(count) + 1) * len(rows.input_ids) // (2 * count)
    return TokenRows(*(values[picked] for values in TokenRows.of(rows)))


def placed_rows(context: Context, rows: TokenRows, *, streams: int = 2, single: bool = False) -> Rows:
    """The rows in the chunks of a pass; states stay on the device where this many `streams` fit."""
    width, budget = context.model.config.hidden_size, device_budget(context.config.device_memory)
    resident = budget is None or streams * rows.input_ids.size * width * 4 <= budget
    return Rows.of(rows.mask, width, single=single, resident=resident)


def embedded(context: Context, rows: TokenRows) -> HostCarry:
    """The carry of a pass over hidden states before the first module."""
    return {STATES: embed(context.model, rows.input_ids, context.config.seed)}
