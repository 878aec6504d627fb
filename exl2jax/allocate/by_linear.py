"""Allocation by linear: every linear is chosen for by itself, and every mixture of widths within it is an option.

At a price per bit the best mixture of a linear does not depend on the other linears (`mixtures`). A first sweep finds
two neighbouring prices whose mixtures enclose the budget. A second sweep between the two gives each linear a few
options near the optimum. The exact solver picks among the options and proves how far the result can be from the best.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from exl2jax.allocate.mixtures import Mixture, best_mixtures
from exl2jax.measure.sensitivity import LinearCosts
from exl2jax.ops.knapsack import solve
from exl2jax.qparams import q

NARROWEST, WIDEST = q("2", "1", "128"), q("8", "1", "32")

FIRST_PRICE, DECADES, STEPS = 1e-8, 13, 39
"""The prices of the first sweep are `FIRST_PRICE * 10 ** (DECADES * k / STEPS)` for integers `k`, in nats per bit per
weight. Which integers are taken follows from the costs of the model."""

BELOW, ABOVE = 23, 16
"""Steps of the first sweep below and above the typical cost per weight at 4 bits."""

EXTENSION = 40
"""Steps that the first sweep is extended by at a time, until it encloses the budget."""

LOWEST_PRICE, HIGHEST_PRICE = 1e-200, 1e200
"""Bounds of the prices, far beyond any costs that can be measured."""

FINE_STEPS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearChoice:
    """The mixture of every linear by key, and the proven distance of their summed cost to the optimum in nats."""

    mixtures: Mapping[str, Mixture]
    gap: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sweep:
    """The best mixture of every linear, by key, at each of the rising `prices [P]` in nats per bit."""

    prices: np.ndarray
    mixtures: Mapping[str, list[Mixture]]

    def totals(self) -> np.ndarray:
        """Bits of all linears at each price."""
        return np.asarray([sum(row[p].total_bits for row in self.mixtures.values()) for p in range(len(self.prices))])

    def bound(self, budget: int) -> float:
        """Lagrangian lower bound, over all possible mixtures, of the cost within `budget`."""
        relaxed = [
            sum(row[p].cost + price * row[p].total_bits for row in self.mixtures.values()) - price * budget
            for p, price in enumerate(self.prices)
        ]
        return float(max(relaxed))


def allocate_by_linear(linears: Mapping[str, LinearCosts], budget: int) -> LinearChoice:
    """The mixtures of least total cost within `budget` bits; the budget must reach the narrowest widths.

    The budget is spent: no linear could take a wider option of those at hand, at the same cost or less, with the bits
    that are left.
    """
    coarse, first = _enclose(linears, budget)
    low, high = coarse.prices[max(first - 1, 0)], coarse.prices[first]
    fine = _sweep(linears, np.geomspace(low, high, FINE_STEPS))
    options = {key: _distinct([*coarse.mixtures[key], *fine.mixtures[key]]) for key in linears}
    costs = [np.asarray([m.total_bits for m in row], np.int64) for row in options.values()]
    losses = [np.asarray([m.cost for m in row]) for row in options.values()]
    solution = solve(costs, losses, budget)
    assert solution is not None  # the narrowest mixtures fit, and the sweep ends in them
    choice = _spend(costs, losses, solution.choice, budget)
    chosen = {key: row[i] for (key, row), i in zip(options.items(), choice, strict=True)}
    bounds = [coarse.bound(budget), fine.bound(budget)]
    return LinearChoice(mixtures=chosen, gap=max(0.0, solution.loss - max(bounds)))


def _enclose(linears: Mapping[str, LinearCosts], budget: int) -> tuple[_Sweep, int]:
    """The first sweep, and the index of the first price at which all linears together fit the budget.

    The sweep starts around the costs of the model. It grows downwards while all its mixtures fit and could still grow,
    and upwards while none fits.
    """
    weights = sum(x.rows * x.columns for x in linears.values())
    middle = _nearest_step(linears, weights)
    start, stop = middle - BELOW, middle + ABOVE + 1
    sweep = _sweep(linears, _prices(start, stop) / weights)
    dearest = sum(x.ends[1].total_bits(x.rows, x.columns) for x in linears.values())
    while (totals := sweep.totals())[0] <= min(budget, dearest - 1) and sweep.prices[0] * weights > LOWEST_PRICE:
        sweep = _joined(_sweep(linears, _prices(start - EXTENSION, start) / weights), sweep)
        start -= EXTENSION
    while (totals := sweep.totals())[-1] > budget and sweep.prices[-1] * weights < HIGHEST_PRICE:
        sweep = _joined(sweep, _sweep(linears, _prices(stop, stop + EXTENSION) / weights))
        stop += EXTENSION
    return sweep, int(np.argmax(totals <= budget)) if (totals <= budget).any() else len(totals) - 1


def _nearest_step(linears: Mapping[str, LinearCosts], weights: int) -> int:
    """The step of the price grid that is nearest to the typical cost of a linear per weight."""
    costs = np.asarray([float(np.sum(x.measured[4, 128])) * weights / (x.rows * x.columns) for x in linears.values()])
    costs = costs[costs > 0]
    if not costs.size:
        return BELOW
    decades = float(np.log10(np.clip(np.median(costs), LOWEST_PRICE, HIGHEST_PRICE) / FIRST_PRICE))
    return round(decades * STEPS / DECADES)


def _prices(start: int, stop: int) -> np.ndarray:
    """The prices of the steps from `start` up to `stop`, `stop` excluded, in nats per bit per weight."""
    return FIRST_PRICE * 10.0 ** (np.arange(start, stop) * DECADES / STEPS)


def _sweep(linears: Mapping[str, LinearCosts], prices: np.ndarray) -> _Sweep:
    """The best mixture of every linear at every price; linears of one shape and the same widths are solved together."""
    found: dict[str, list[Mixture]] = {}

    def alike(key: str) -> tuple[int, int, tuple[int, ...]]:
        return linears[key].rows, linears[key].columns, linears[key].widths

    for _, keys in groupby(sorted(linears, key=alike), key=alike):
        batch = list(keys)
        found |= dict(zip(batch, best_mixtures([linears[key] for key in batch], prices), strict=True))
    return _Sweep(prices=prices, mixtures={key: found[key] for key in linears})


def _joined(first: _Sweep, second: _Sweep) -> _Sweep:
    """Two sweeps as one; the prices of the second are higher."""
    return _Sweep(
        prices=np.concatenate([first.prices, second.prices]),
        mixtures={key: [*row, *second.mixtures[key]] for key, row in first.mixtures.items()},
    )


def _spend(costs: list[np.ndarray], losses: list[np.ndarray], choice: tuple[int, ...], budget: int) -> tuple[int, ...]:
    """The choice with the bits that are left given to options that cost no more nats.

    The solver has spent what reduces the cost. This matters where options cost the same, as with costs of zero.
    """
    spent, left = list(choice), budget - sum(int(c[i]) for c, i in zip(costs, choice, strict=True))
    while True:
        found = [
            (int(c[i]) - int(c[spent[s]]), s, i)
            for s, (c, loss) in enumerate(zip(costs, losses, strict=True))
            for i in np.flatnonzero((c > c[spent[s]]) & (c - c[spent[s]] <= left) & (loss <= loss[spent[s]])).tolist()
        ]
        if not found:
            return tuple(spent)
        extra, s, i = min(found)
        left -= extra
        spent[s] = i


def _distinct(mixtures: list[Mixture]) -> list[Mixture]:
    """Each mixture once, cheapest in bits first."""
    return sorted({m.qparams: m for m in mixtures}.values(), key=lambda m: (m.total_bits, m.cost))
