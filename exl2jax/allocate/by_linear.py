"""Free allocation: every linear is a slot of its own, every mixture of widths within it an option.

At a price per bit each linear's best mixture is found apart from the others (`mixes`). Two sweeps over prices, the
second between the two of the first that enclose the budget, give each linear a few options around the optimum; the
exact solver picks among them and proves how far the result can be from the best.
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

COARSE = np.geomspace(1e-8, 1e5, 40)
"""Prices of the first sweep, in nats per bit per weight: from far above 8 bits to far below 2."""

FINE_STEPS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class FreeChoice:
    """The mixture of every linear by key, and the proven distance of their summed cost to the optimum in nats."""

    mixtures: Mapping[str, Mixture]
    gap: float


def free_choice(linears: Mapping[str, LinearCosts], budget: int) -> FreeChoice:
    """The mixtures of least total cost within `budget` bits; the budget must reach the narrowest widths."""
    weights = sum(x.rows * x.columns for x in linears.values())
    coarse = _sweep(linears, COARSE / weights)
    totals = np.asarray([sum(row[p].total_bits for row in coarse.values()) for p in range(len(COARSE))])
    first = int(np.argmax(totals <= budget)) if (totals <= budget).any() else len(COARSE) - 1
    low, high = COARSE[max(first - 1, 0)], COARSE[first]
    prices = np.geomspace(low, high, FINE_STEPS) / weights
    fine = _sweep(linears, prices)
    options = {key: _distinct([*coarse[key], *fine[key]]) for key in linears}
    costs = [np.asarray([m.total_bits for m in row], np.int64) for row in options.values()]
    losses = [np.asarray([m.cost for m in row]) for row in options.values()]
    solution = solve(costs, losses, budget)
    assert solution is not None  # the narrowest fits, and the sweep ends in it
    chosen = {key: row[i] for (key, row), i in zip(options.items(), solution.choice, strict=True)}
    bounds = [_bound(coarse, COARSE / weights, budget), _bound(fine, prices, budget)]
    return FreeChoice(mixtures=chosen, gap=max(0.0, solution.loss - max(bounds)))


def _sweep(linears: Mapping[str, LinearCosts], prices: np.ndarray) -> dict[str, list[Mixture]]:
    """The best mixture of every linear at every price; linears of one shape and the same widths are solved together."""
    found: dict[str, list[Mixture]] = {}

    def alike(key: str) -> tuple[int, int, tuple[int, ...]]:
        return linears[key].rows, linears[key].columns, linears[key].widths

    for _, keys in groupby(sorted(linears, key=alike), key=alike):
        batch = list(keys)
        found |= dict(zip(batch, best_mixtures([linears[key] for key in batch], prices), strict=True))
    return {key: found[key] for key in linears}


def _bound(found: Mapping[str, list[Mixture]], prices: np.ndarray, budget: int) -> float:
    """Lagrangian lower bound, over all mixtures there are, of the cost within `budget`."""
    relaxed = [
        sum(row[p].cost + price * row[p].total_bits for row in found.values()) - price * budget
        for p, price in enumerate(prices)
    ]
    return float(max(relaxed))


def _distinct(mixtures: list[Mixture]) -> list[Mixture]:
    """Each mixture once, cheapest in bits first."""
    return sorted({m.qparams: m for m in mixtures}.values(), key=lambda m: (m.total_bits, m.cost))
