"""Solvers of the row-wise allocation: an option for every slot, all within a budget of bits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from exl2jax.errors import MeasurementError
from exl2jax.ops.annealing import RUNS, anneal
from exl2jax.ops.knapsack import solve
from exl2jax.variants.registry import NoSettings, variant

NORM_RANGE = (1.5, 3.5)
NORM_STEP = 0.075
"""Half width of annealing's fine sweep around the best norm of its coarse one; a run per norm."""

EXACT_NORM = 1.0
"""Norm of the exact solver: the sum of errors. Higher norms starve attention, whose errors are small but count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Costs in bits (int64) and errors of the options of each slot, and the bits there are for all."""

    costs: list[np.ndarray]
    errors: list[np.ndarray]
    budget: int

    def losses(self, norm: float) -> list[np.ndarray]:
        """`error^norm` of every option."""
        return [e**norm for e in self.errors]

    def objective(self, choice: Sequence[int], norm: float) -> float:
        """`sum error^norm` of a choice."""
        return float(sum(e[i] ** norm for e, i in zip(self.errors, choice, strict=True)))

    def cost(self, choice: Sequence[int]) -> int:
        """Bits of a choice."""
        return int(sum(c[i] for c, i in zip(self.costs, choice, strict=True)))

    def max_error(self, choice: Sequence[int]) -> float:
        """Largest error of a choice."""
        return float(max(e[i] for e, i in zip(self.errors, choice, strict=True)))


class Solved(NamedTuple):
    """An option per slot, the norm of the errors whose sum it minimises, and its proven gap, None without a proof."""

    choice: tuple[int, ...]
    norm: float
    gap: float | None


@variant("solver", "exact")
def exact(problem: Problem, seed: int, settings: NoSettings) -> Solved:
    """The optimum of the sum of errors, proven: a knapsack with Lagrangian bounds (`ops/knapsack.py`)."""
    solution = solve(problem.costs, problem.losses(EXACT_NORM), problem.budget)
    if solution is None:
        raise MeasurementError("no allocation fits the budget")
    return Solved(solution.choice, EXACT_NORM, solution.gap)


@variant("solver", "annealing")
def annealing(problem: Problem, seed: int, settings: NoSettings) -> Solved:
    """Stock's seeded annealing with the norm, 1.5 to 3.5, of the smallest maximal error (docs/format.md 4)."""
    counts = np.asarray([len(c) for c in problem.costs])
    width = int(counts.max())
    costs = np.stack([np.pad(c, (0, width - len(c))) for c in problem.costs])

    def runs(norms: np.ndarray, stage: int) -> list[tuple[int, ...]]:
        padded = [[np.pad(v, (0, width - len(v))) for v in problem.losses(float(norm))] for norm in norms]
        found = anneal(costs, np.asarray(padded), counts, problem.budget, seed=(seed, stage))
        return [_top_up(problem, choice) for choice in found]

    norm = _best_norm(problem, runs)
    last = runs(np.full(RUNS, norm), 2)
    best = min(last, key=lambda c: (problem.cost(c) > problem.budget, problem.objective(c, norm)))
    return Solved(best, norm, None)


def _best_norm(problem: Problem, solve_at: Callable[[np.ndarray, int], list[tuple[int, ...]]]) -> float:
    """The norm whose solution has the smallest maximal error: a coarse sweep, then a fine one around its best."""
    norm, around = sum(NORM_RANGE) / 2, (NORM_RANGE[1] - NORM_RANGE[0]) / 2
    for stage, width in enumerate((around, NORM_STEP)):
        tried = np.linspace(norm - width, norm + width, RUNS)
        norm = float(tried[int(np.argmin([problem.max_error(choice) for choice in solve_at(tried, stage)]))])
    return norm


def _top_up(problem: Problem, choice: np.ndarray) -> tuple[int, ...]:
    """Spend what is left of the budget: raise slots to the next dearer option that lowers their error."""
    out = [int(i) for i in choice]
    left = problem.budget - problem.cost(out)
    raised = True
    while raised:
        raised = False
        for s, (costs, errors) in enumerate(zip(problem.costs, problem.errors, strict=True)):
            extra = costs - costs[out[s]]
            better = np.flatnonzero((errors < errors[out[s]]) & (extra <= left))
            if len(better):
                i = int(better[np.argmin(costs[better])])
                left -= int(extra[i])
                out[s] = i
                raised = True
    return tuple(out)
