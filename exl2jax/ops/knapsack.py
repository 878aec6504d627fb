"""Exact multiple-choice knapsack: one option per slot, least total loss within a budget.

Lagrangian relaxation gives a lower bound and a multiplier; a solution within the gap uses only options whose reduced
loss fits into it, which leaves few, and a dynamic program over those finds the optimum with its proof.
"""

from dataclasses import dataclass, replace

import numpy as np

MAX_STATES = 400_000
"""Most partial solutions kept per slot; beyond it the best are kept and the result carries its proven gap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """Chosen option per slot, total cost and loss, and the proven distance to the optimum (0: it is the optimum)."""

    choice: tuple[int, ...]
    cost: int
    loss: float
    gap: float


def solve(costs: list[np.ndarray], losses: list[np.ndarray], budget: int) -> Solution | None:
    """Minimise the sum of `losses` with the sum of integer `costs` at most `budget`; None when nothing fits."""
    if sum(int(c.min()) for c in costs) > budget:
        return None
    unit = _unit(losses)
    found = _solve(costs, [loss / unit for loss in losses], budget)
    return replace(found, loss=_total(losses, list(found.choice)), gap=found.gap * unit)


def _unit(losses: list[np.ndarray]) -> float:
    """The power of two next to the largest loss: tolerances are relative to it, and dividing by it is exact."""
    largest = max((float(np.max(np.abs(loss))) for loss in losses), default=0.0)
    return float(np.ldexp(1.0, int(np.frexp(largest)[1]))) if 0 < largest < np.inf else 1.0


def _solve(costs: list[np.ndarray], losses: list[np.ndarray], budget: int) -> Solution:
    """The solution for losses of at most one; the cheapest options fit the budget."""
    price, bound = _multiplier(costs, losses, budget)
    incumbent = _greedy(costs, losses, budget, price)
    best_loss = _total(losses, incumbent)
    slack = max(best_loss - bound, 0.0) + 1e-12 * max(1.0, abs(best_loss))
    reduced = [loss + price * cost for cost, loss in zip(costs, losses, strict=True)]
    reduced = [r - r.min() for r in reduced]
    choice, complete = _search(costs, losses, reduced, budget, slack)
    if choice is None or _total(losses, choice) > best_loss:
        choice = incumbent
    loss = _total(losses, choice)
    gap = 0.0 if complete else max(loss - bound, 0.0)
    return Solution(choice=tuple(choice), cost=int(_total(costs, choice)), loss=loss, gap=gap)


def _total(values: list[np.ndarray], choice: list[int]) -> float:
    return float(sum(v[i] for v, i in zip(values, choice, strict=True)))


def _at_price(costs: list[np.ndarray], losses: list[np.ndarray], price: float) -> list[int]:
    """The cheapest-enough choice that minimises `loss + price * cost` slot by slot."""
    return [int(np.lexsort((c, loss + price * c))[0]) for c, loss in zip(costs, losses, strict=True)]


def _multiplier(costs: list[np.ndarray], losses: list[np.ndarray], budget: int) -> tuple[float, float]:
    """Price per bit that brings the relaxed choice to the budget, and the best lower bound met on the way."""

    def bound(price: float) -> float:
        best = sum(float(np.min(loss + price * c)) for c, loss in zip(costs, losses, strict=True))
        return best - price * budget

    low, high = 0.0, 1e-12
    while _total(costs, _at_price(costs, losses, high)) > budget:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        if _total(costs, _at_price(costs, losses, middle)) > budget:
            low = middle
        else:
            high = middle
    prices = (low, high)
    best = max(prices, key=bound)
    return best, bound(best)


def _greedy(costs: list[np.ndarray], losses: list[np.ndarray], budget: int, price: float) -> list[int]:
    """A feasible choice: the relaxed one, then the exchanges that gain most per bit while the budget lasts."""
    choice = _at_price(costs, losses, price)
    while _total(costs, choice) > budget:
        price = price * 1.001 + 1e-15
        choice = _at_price(costs, losses, price)
    left = budget - int(_total(costs, choice))
    while True:
        best, gain = None, 0.0
        for s, (c, loss) in enumerate(zip(costs, losses, strict=True)):
            extra, less = c - c[choice[s]], loss[choice[s]] - loss
            rate = np.where((less > 0) & (extra <= left), less / np.maximum(extra, 1), 0.0)
            i = int(np.argmax(rate))
            if rate[i] > gain:
                best, gain = (s, i), float(rate[i])
        if best is None:
            return choice
        s, i = best
        left -= int(costs[s][i] - costs[s][choice[s]])
        choice[s] = i


def _search(
    costs: list[np.ndarray], losses: list[np.ndarray], reduced: list[np.ndarray], budget: int, slack: float
) -> tuple[list[int] | None, bool]:
    """Dynamic program over the options whose reduced loss stays within `slack`; and whether nothing was cut off."""
    least = [*np.cumsum([int(c.min()) for c in costs][::-1])[::-1].tolist(), 0]
    cost, loss, spent = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    complete = True
    for s, (c, v, r) in enumerate(zip(costs, losses, reduced, strict=True)):
        options = np.flatnonzero(r <= slack)
        parent = np.repeat(np.arange(len(cost)), len(options))
        option = np.tile(options, len(cost))
        cost, loss, spent = cost[parent] + c[option], loss[parent] + v[option], spent[parent] + r[option]
        fits = np.flatnonzero((spent <= slack) & (cost + least[s + 1] <= budget))
        order = fits[np.lexsort((loss[fits], cost[fits]))]
        before = np.concatenate([[np.inf], np.minimum.accumulate(loss[order])[:-1]]) if len(order) else loss[order]
        keep = order[loss[order] < before]
        if len(keep) > MAX_STATES:
            complete = False
            keep = np.sort(keep[np.argpartition(spent[keep], MAX_STATES)[:MAX_STATES]])
        if not len(keep):
            return None, complete
        trail.append((parent[keep], option[keep]))
        cost, loss, spent = cost[keep], loss[keep], spent[keep]
    index = int(np.argmin(loss))
    choice = []
    for parent, option in reversed(trail):
        choice.append(int(option[index]))
        index = int(parent[index])
    return choice[::-1], complete
