"""The best mixture of widths within a matrix at a price per bit, by dynamic programming over its row tiles.

In act-order the first rows matter most, and the format lets widths only fall from row to row. A mixture is a sequence
of groups, each of one width and one group size; it costs nats (`sensitivity`) and bits. For a price per bit the best
one is found exactly; the mixtures over a range of prices are the lower convex hull of all mixtures.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from exl2jax.measure.sensitivity import LinearCosts, Setting
from exl2jax.qparams import ROW_MULTIPLE, QParams, padded_columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """A setting of one linear, its bits on disk, and its cost in nats per token."""

    qparams: QParams
    total_bits: int
    cost: float


def best_mixtures(linears: Sequence[LinearCosts], prices: np.ndarray) -> list[list[Mixture]]:
    """For each linear the best mixture at each of `prices [P]` (nats per bit); all linears have one shape."""
    rows, columns = linears[0].rows, linears[0].columns
    tables = [linear.costs() for linear in linears]
    settings = tuple(tables[0])
    costs = np.stack([np.stack(list(table.values())) for table in tables])
    ahead = _costs_ahead(costs, settings, columns, prices)
    found: dict[tuple[int, tuple[Setting, ...]], Mixture] = {}
    out: list[list[Mixture]] = []
    for b, table in enumerate(tables):
        out.append([])
        for p in range(len(prices)):
            groups = tuple(_walk(ahead[:, :, b, p], settings))
            if (b, groups) not in found:
                found[b, groups] = _mixture(groups, table, rows, columns)
            out[-1].append(found[b, groups])
    return out


def _costs_ahead(costs: np.ndarray, settings: Sequence[Setting], columns: int, prices: np.ndarray) -> np.ndarray:
    """Least cost of tiles `t..` whose first group has setting `c`: `[T + 1, C, B, P]`, for `costs [B, C, T]`."""
    linears, count, tiles = costs.shape
    sums = np.concatenate([np.zeros((linears, count, 1)), np.cumsum(costs, axis=2)], axis=2)
    ahead = np.zeros((tiles + 1, count, linears, len(prices)))
    for t in reversed(range(tiles)):
        for c, setting in enumerate(settings):
            end = min(t + setting[1] // ROW_MULTIPLE, tiles)
            group = (sums[:, c, end] - sums[:, c, t])[:, None] + prices * _group_bits(setting[0], end - t, columns)
            ahead[t, c] = group + ahead[end, _successors(c, settings)].min(axis=0)
    return ahead


def _successors(c: int, settings: Sequence[Setting]) -> list[int]:
    """The settings that may follow a group of setting `c`: itself, or any narrower width."""
    return [c, *(i for i, setting in enumerate(settings) if setting[0] < settings[c][0])]


def _walk(ahead: np.ndarray, settings: Sequence[Setting]) -> Iterator[Setting]:
    """Settings of the groups along the best path through `ahead [T + 1, C]`."""
    t, choices = 0, list(range(len(settings)))
    while t < len(ahead) - 1:
        c = min(choices, key=lambda i: ahead[t, i])
        yield settings[c]
        t = min(t + settings[c][1] // ROW_MULTIPLE, len(ahead) - 1)
        choices = _successors(c, settings)


def _mixture(groups: Sequence[Setting], table: dict[Setting, np.ndarray], rows: int, columns: int) -> Mixture:
    cost, t, parts = 0.0, 0, []
    for setting, run in groupby(groups):
        end = min(t + len(list(run)) * setting[1] // ROW_MULTIPLE, rows // ROW_MULTIPLE)
        cost += float(table[setting][t:end].sum())
        parts.append((setting, end - t))
        t = end
    qparams = QParams(
        bits=tuple(bits for (bits, _), _ in parts),
        bits_prop=_shares([tiles for _, tiles in parts]),
        group_size=tuple(size for (_, size), _ in parts),
    )
    return Mixture(qparams=qparams, total_bits=qparams.total_bits(rows, columns), cost=cost)


def _shares(tiles: Sequence[int]) -> tuple[float, ...]:
    """Shares that `QParams.groups` turns back into exactly these tiles: rounded down, since it rounds groups up."""
    total = sum(tiles)
    shares = [_share(n, total) for n in tiles[:-1]]
    return (*shares, 1.0 - sum(shares))


def _share(tiles: int, total: int) -> float:
    """`tiles / total` in millionths, such that the rows it stands for are no more than they are, in floats too."""
    share = math.floor(tiles / total * 1e6) / 1e6
    rows = total * ROW_MULTIPLE
    return share if rows * share <= tiles * ROW_MULTIPLE else round(share - 1e-6, 6)


def _group_bits(bits: int, tiles: int, columns: int) -> int:
    """Bits on disk of a group: codes, its maximum and table entry, its scale indices."""
    padded = padded_columns(columns)
    return tiles * ROW_MULTIPLE * bits * padded + 16 + 32 + 4 * padded
