"""Multiple-choice knapsack by trying everything."""

from collections.abc import Sequence
from itertools import product


def best_loss(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> float | None:
    """Least total loss of one option per slot within the budget; None when nothing fits."""
    best = None
    for choice in product(*(range(len(row)) for row in costs)):
        if sum(row[i] for row, i in zip(costs, choice, strict=True)) <= budget:
            loss = sum(row[i] for row, i in zip(losses, choice, strict=True))
            best = loss if best is None else min(best, loss)
    return best
