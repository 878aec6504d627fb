"""The group table of a linear, `q_groups`: every rule it must keep, reported all at once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from exl2jax.qparams import FORMAT_BITS, GROUP_SIZES, ROW_MULTIPLE, Group

FULL_SIZES = (32, 64, 128)
"""Rows of a group that is not the last of its matrix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A group table as stored: `widths` in bits, `starts` in word rows, for `words` rows of `q_weight` and `rows` of
    the matrix.
    """  # noqa: D205

    widths: tuple[int, ...]
    starts: tuple[int, ...]
    words: int
    rows: int

    @classmethod
    def of(cls, q_groups: np.ndarray, words: int, rows: int) -> "Table":
        """Split `q_groups [2G]` into its pairs."""
        return cls(widths=tuple(q_groups[0::2].tolist()), starts=tuple(q_groups[1::2].tolist()), words=words, rows=rows)

    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """`(bits, first word row, end)` of every group."""
        ends = (*self.starts, self.words)
        return tuple((bits, a, b) for bits, (a, b) in zip(self.widths, pairwise(ends), strict=True))


def table_faults(table: Table) -> list[str]:
    """Messages for every rule that the table breaks; sizes are judged only where widths and starts make sense."""
    return list(_order_faults(table)) or list(_size_faults(table))


def table_groups(table: Table) -> tuple[Group, ...]:
    """The groups of a table without faults."""
    groups, row = [], 0
    for bits, a, b in table.spans():
        groups.append(Group(bits=bits, start=row, rows=(b - a) // bits * ROW_MULTIPLE))
        row += groups[-1].rows
    return tuple(groups)


def word_rows_fault(table: Table) -> str | None:
    """A message where all groups before the last are sound but `q_weight` does not end where the last one must.

    Table and `q_weight` then contradict each other, and either may be the damaged one.
    """
    *earlier, (bits, start, _) = table.spans()
    known = set(table.widths) <= set(FORMAT_BITS) and list(table.widths) == sorted(table.widths, reverse=True)
    if not known or any((b - a) % width for width, a, b in earlier):
        return None
    left = table.rows - sum((b - a) // width * ROW_MULTIPLE for width, a, b in earlier)
    end = start + left * bits // ROW_MULTIPLE
    if left not in GROUP_SIZES or end == table.words:
        return None
    return f"has {table.words} word rows; q_groups and the {table.rows} rows of the matrix imply {end}"


def _order_faults(table: Table) -> Iterator[str]:
    unknown = sorted(set(table.widths) - set(FORMAT_BITS))
    if unknown:
        yield f"bit widths {unknown} are not among {list(FORMAT_BITS)}"
    if table.starts[0] != 0:
        yield f"the first group starts at word row {table.starts[0]}, not 0"
    yield from _first(
        f"group {i} runs from word row {a} to {b}; starts must increase and end below q_weight's {table.words}"
        for i, (_, a, b) in enumerate(table.spans())
        if b <= a
    )
    yield from _first(
        f"group {i} has {bits} bits after {before}; widths must not increase"
        for i, (before, bits) in enumerate(pairwise(table.widths), start=1)
        if bits > before
    )


def _size_faults(table: Table) -> Iterator[str]:
    broken = [
        f"group {i} has word rows {a} to {b} at {bits} bits, which is not a multiple of {ROW_MULTIPLE} rows"
        for i, (bits, a, b) in enumerate(table.spans())
        if (b - a) % bits
    ]
    if broken:
        yield from _first(broken)
        return
    groups = table_groups(table)
    yield from _first(_row_faults(groups))
    covered = sum(group.rows for group in groups)
    if covered != table.rows:
        yield f"the groups cover {covered} rows, the matrix has {table.rows}"


def _row_faults(groups: Sequence[Group]) -> Iterator[str]:
    """A width has one group size; only the last group of the matrix may be shorter."""
    size_of = {group.bits: group.rows for group in reversed(groups)}
    for i, group in enumerate(groups):
        last = i == len(groups) - 1
        if group.rows not in (GROUP_SIZES if last else FULL_SIZES):
            yield f"group {i} has {group.rows} rows; groups have 32, 64 or 128, only the last may have 96"
        elif group.rows > size_of[group.bits] or (group.rows < size_of[group.bits] and not last):
            yield f"group {i} has {group.rows} rows, the {group.bits}-bit groups before it {size_of[group.bits]}"


def _first(messages: Iterable[str]) -> Iterator[str]:
    """The first message of a rule, with the number of groups that break it as well."""
    found = list(messages)
    if found:
        yield found[0] + (f" (and {len(found) - 1} groups more)" if len(found) > 1 else "")
