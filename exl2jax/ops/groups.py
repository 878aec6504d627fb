"""The cut of a matrix into groups as one small array, so that neither their number nor their widths are a shape."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from exl2jax.qparams import ROW_MULTIPLE, Group

LARGEST_GROUP = 128
"""Most rows of a group."""


class Begin(NamedTuple):
    """Where a group begins: at row `steps * step` of its matrix, with `step` static and a multiple of 32.

    A loop that walks groups of one size gives its counter, which a GPU takes as it is: a product would be a launch.
    """

    steps: jax.Array | int
    step: int = ROW_MULTIPLE

    @property
    def row(self) -> jax.Array:
        """The first row."""
        return jnp.int32(self.steps * self.step)


TOP = Begin(0)


class GroupTable(NamedTuple):
    """Columns of a table of groups, each `[K / 32]` int32, as long as the tiles of 32 rows of the matrix.

    By group: first row `start`, `rows` (0 beyond the last group), `bits`. By tile: the group it belongs to and its
    width. By span, a run of groups that takes up the errors before it at once: its first row, its first group, and its
    number of groups (0 beyond the last span).
    """

    start: jax.Array
    rows: jax.Array
    bits: jax.Array
    tile_group: jax.Array
    tile_bits: jax.Array
    span_start: jax.Array
    span_first: jax.Array
    span_groups: jax.Array

    @classmethod
    def of(cls, table: jax.Array) -> "GroupTable":
        """The columns of what `group_table` made."""
        return cls(*(table[i] for i in range(len(cls._fields))))

    @property
    def number(self) -> jax.Array:
        """Number of groups."""
        return jnp.sum(self.rows > 0, dtype=jnp.int32)

    @property
    def spans(self) -> jax.Array:
        """Number of spans."""
        return jnp.sum(self.span_groups > 0, dtype=jnp.int32)


def group_table(groups: Sequence[Group], rows: int) -> np.ndarray:
    """The groups of a matrix of `rows` rows as the array `[8, rows / 32]` int32 that `GroupTable.of` takes apart."""
    group, bits = groups_by_tile(groups)
    columns = (
        [g.start for g in groups],
        [g.rows for g in groups],
        [g.bits for g in groups],
        group,
        bits,
        *zip(*_spans(groups, span_rows(rows)), strict=True),
    )
    table = np.zeros((len(columns), rows // ROW_MULTIPLE), np.int32)
    for row, column in zip(table, columns, strict=True):
        row[: len(column)] = column
    return table


def groups_by_tile(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """For each tile of 32 rows: the index of its group, and its width in bits, int32."""
    sizes = [g.rows // ROW_MULTIPLE for g in groups]
    return np.repeat(np.arange(len(groups)), sizes), np.repeat(np.asarray([g.bits for g in groups], np.int32), sizes)


def span_rows(rows: int) -> int:
    """Most rows of a span: enough for efficient products, little enough to waste few on zeros."""
    return min(128 if rows < 2048 else 256, rows)


def _spans(groups: Sequence[Group], most: int) -> list[tuple[int, int, int]]:
    """Runs of groups of one size that fit `most` rows: `(first row, first group, number of groups)`."""
    out, first = list[tuple[int, int, int]](), 0
    for size, run in groupby(groups, key=lambda g: g.rows):
        end, step = first + len(list(run)), max(most // size, 1)
        out += [(groups[i].start, i, min(step, end - i)) for i in range(first, end, step)]
        first = end
    return out
