"""Bit allocation: which setting every linear gets, so that the whole reaches a target average."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exl2jax.errors import MeasurementError
from exl2jax.models import ModuleSpec, slots_of
from exl2jax.pipeline.annealing import RUNS, anneal
from exl2jax.pipeline.free import NARROWEST, WIDEST, free_choice
from exl2jax.pipeline.knapsack import solve
from exl2jax.pipeline.measurement import Candidate, Measurement, candidate_rows, module_bits
from exl2jax.pipeline.recipe import Pricing
from exl2jax.qparams import QParams
from exl2jax.variants import Choice

NORM_RANGE = (1.5, 3.5)
NORM_STEP = 0.075
"""Half width of annealing's fine sweep around the best norm of its coarse one; a run per norm."""

EXACT_NORM = 1.0
"""Norm of the exact solver: the sum of errors. Higher norms starve attention, whose errors are small but count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """What was chosen: `qparams` by module key and linear name, the bits it costs, and how it was found.

    `pricing` says what the bits were spent against. By `fisher` or `divergence`, `objective` is the expected KL
    divergence in nats per token; by `accuracy` it is `sum error^norm`, and `max_error` the largest error of a module.
    `gap` is the proven distance of the objective to its optimum, None where nothing is proven.
    """

    qparams: Mapping[str, Mapping[str, QParams]]
    total_bits: int
    weights: int
    objective: float
    pricing: Pricing
    solver: str
    gap: float | None
    norm: float | None = None
    max_error: float | None = None

    @property
    def bpw(self) -> float:
        """Bits per weight over the decoder's linears."""
        return self.total_bits / self.weights


@dataclass(frozen=True, kw_only=True, slots=True)
class _Problem:
    costs: list[np.ndarray]
    errors: list[np.ndarray]
    budget: int

    def losses(self, norm: float) -> list[np.ndarray]:
        return [e**norm for e in self.errors]

    def objective(self, choice: Sequence[int], norm: float) -> float:
        return float(sum(e[i] ** norm for e, i in zip(self.errors, choice, strict=True)))

    def cost(self, choice: Sequence[int]) -> int:
        return int(sum(c[i] for c, i in zip(self.costs, choice, strict=True)))

    def max_error(self, choice: Sequence[int]) -> float:
        return float(max(e[i] for e, i in zip(self.errors, choice, strict=True)))


_Choice = tuple[tuple[int, ...], float | None]


def feasible_bpw(measurement: Measurement, specs: Sequence[ModuleSpec], pricing: Pricing) -> tuple[float, float]:
    """Least and greatest bits per weight that allocation by `pricing` can reach."""
    if pricing != "accuracy":
        linears = [linear for spec in specs for linear in spec.linears]
        priced = measurement.sensitivity.linears if measurement.sensitivity is not None else {}
        ends = [(priced[x.key].ends if x.key in priced else (NARROWEST, WIDEST)) for x in linears]
        low, high = (
            sum(end[i].total_bits(x.rows, x.columns) for x, end in zip(linears, ends, strict=True)) for i in (0, 1)
        )
    else:
        rows = measurement.modules.values()
        low, high = (sum(pick(c.total_bits for c in row) for row in rows) for pick in (min, max))
    weights = sum(spec.weights for spec in specs)
    return low / weights, high / weights


def require_reachable(specs: Sequence[ModuleSpec], bits: float, pricing: Pricing) -> None:
    """Refuse a target below the cheapest settings there are, before hours of measuring lead to the same answer."""
    _reachable_budget(reach(specs, pricing), specs, bits)


def reach(specs: Sequence[ModuleSpec], pricing: Pricing) -> tuple[float, float]:
    """Least and greatest bits per weight of all the settings there are, before anything is measured."""
    tables = {
        slot.key: tuple(
            Candidate(qparams=row, total_bits=module_bits(slot, row), accuracy=1.0) for row in candidate_rows(slot)
        )
        for slot in slots_of(specs)
    }
    return feasible_bpw(Measurement(modules=tables if pricing == "accuracy" else {}), specs, pricing)


def _reachable_budget(within: tuple[float, float], specs: Sequence[ModuleSpec], bits: float) -> int:
    """The budget in bits; `MeasurementError` with the feasible range when it is below the least."""
    low, high = within
    weights = sum(spec.weights for spec in specs)
    budget = int(weights * bits)
    if budget < round(low * weights):
        raise MeasurementError(f"-b {bits}: these candidates reach {low:.4f} to {high:.4f} bits per weight; raise -b")
    return budget


def allocate(
    measurement: Measurement,
    specs: Sequence[ModuleSpec],
    bits: float,
    *,
    pricing: Pricing,
    solver: str,
    seed: int,
    objective: Choice | None = None,
) -> Strategy:
    """Choose a setting per linear within `int(weights * bits)` bits.

    By `fisher` and `divergence` every linear takes the mixture of widths that serves the whole best (`free_choice`).
    By `accuracy` every module takes a row of its candidates; `solver` is then `exact` (the optimum of the sum of
    errors, proven) or `annealing` (stock's search, seeded, which picks the norm of its objective between 1.5 and 3.5 by
    the smallest maximal error); `objective` is what they take for an error, the measured one by default. Raises
    `MeasurementError` with the feasible range when `bits` cannot be reached.
    """
    budget = _reachable_budget(feasible_bpw(measurement, specs, pricing), specs, bits)
    if pricing != "accuracy":
        return _free_strategy(measurement, specs, budget, pricing)
    return _row_strategy(measurement, specs, budget, solver=solver, seed=seed, objective=objective)


def _free_strategy(measurement: Measurement, specs: Sequence[ModuleSpec], budget: int, pricing: Pricing) -> Strategy:
    assert measurement.sensitivity is not None  # the callers looked
    chosen = free_choice(measurement.sensitivity.linears, budget)
    return Strategy(
        qparams={s.key: {x.name: chosen.mixtures[x.key].qparams for x in s.linears} for s in slots_of(specs)},
        total_bits=sum(mixture.total_bits for mixture in chosen.mixtures.values()),
        weights=sum(spec.weights for spec in specs),
        objective=sum(mixture.cost for mixture in chosen.mixtures.values()),
        pricing=pricing,
        solver="exact",
        gap=chosen.gap,
    )


def _row_strategy(
    measurement: Measurement,
    specs: Sequence[ModuleSpec],
    budget: int,
    *,
    solver: str,
    seed: int,
    objective: Choice | None,
) -> Strategy:
    weights = sum(spec.weights for spec in specs)
    slots = slots_of(specs)
    rows = [measurement.modules[slot.key] for slot in slots]
    problem = _Problem(
        costs=[np.asarray([c.total_bits for c in row], np.int64) for row in rows],
        errors=[_errors(row, objective) for row in rows],
        budget=budget,
    )
    norm, (choice, gap) = (
        _anneal_norms(problem, seed) if solver == "annealing" else (EXACT_NORM, exact_choice(problem, EXACT_NORM))
    )
    return _strategy(problem, slots, rows, choice, weights=weights, norm=norm, solver=solver, gap=gap)


def _errors(row: Sequence[Candidate], objective: Choice | None) -> np.ndarray:
    """What each candidate of a module adds to the sum."""
    errors = np.asarray([candidate.error for candidate in row])
    return errors if objective is None else objective.function(errors, objective.settings)


def _strategy(
    problem: _Problem,
    specs: Sequence[ModuleSpec],
    rows: Sequence[tuple[Candidate, ...]],
    choice: Sequence[int],
    *,
    weights: int,
    norm: float,
    solver: str,
    gap: float | None,
) -> Strategy:
    return Strategy(
        qparams={spec.key: row[i].qparams for spec, row, i in zip(specs, rows, choice, strict=True)},
        total_bits=problem.cost(choice),
        weights=weights,
        objective=problem.objective(choice, norm),
        norm=norm,
        max_error=problem.max_error(choice),
        pricing="accuracy",
        solver=solver,
        gap=gap,
    )


def _best_norm(problem: _Problem, solve_at: Callable[[np.ndarray, int], list[_Choice]]) -> float:
    """The norm whose solution has the smallest maximal error: a coarse sweep, then a fine one around its best."""
    norm, around = sum(NORM_RANGE) / 2, (NORM_RANGE[1] - NORM_RANGE[0]) / 2
    for stage, width in enumerate((around, NORM_STEP)):
        tried = np.linspace(norm - width, norm + width, RUNS)
        norm = float(tried[int(np.argmin([problem.max_error(choice) for choice, _ in solve_at(tried, stage)]))])
    return norm


def exact_choice(problem: _Problem, norm: float) -> _Choice:
    """The optimum of `sum error^norm`, and its proven gap."""
    solution = solve(problem.costs, problem.losses(norm), problem.budget)
    if solution is None:
        raise MeasurementError("no allocation fits the budget")
    return solution.choice, solution.gap


def _anneal_norms(problem: _Problem, seed: int) -> tuple[float, _Choice]:
    counts = np.asarray([len(c) for c in problem.costs])
    width = int(counts.max())
    costs = np.stack([np.pad(c, (0, width - len(c))) for c in problem.costs])

    def runs(norms: np.ndarray, stage: int) -> list[_Choice]:
        padded = [[np.pad(v, (0, width - len(v))) for v in problem.losses(float(norm))] for norm in norms]
        found = anneal(costs, np.asarray(padded), counts, problem.budget, seed=(seed, stage))
        return [(_top_up(problem, choice), None) for choice in found]

    norm = _best_norm(problem, runs)
    last = runs(np.full(RUNS, norm), 2)
    return norm, min(last, key=lambda c: (problem.cost(c[0]) > problem.budget, problem.objective(c[0], norm)))


def _top_up(problem: _Problem, choice: np.ndarray) -> tuple[int, ...]:
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
