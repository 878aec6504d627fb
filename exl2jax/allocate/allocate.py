"""Bit allocation: which setting every linear gets, so that the whole reaches a target average."""

from collections.abc import Sequence

import numpy as np

from exl2jax.allocate.by_linear import NARROWEST, WIDEST, allocate_by_linear
from exl2jax.allocate.limits import NO_LIMITS, Limits
from exl2jax.allocate.strategy import Strategy
from exl2jax.errors import MeasurementError
from exl2jax.measure.measurement import Candidate, Measurement, candidate_rows, module_bits
from exl2jax.measure.sensitivity import width_ends
from exl2jax.models import ModuleSpec, slots_of
from exl2jax.variants import Choice
from exl2jax.variants.candidates import STOCK_TABLE, Table
from exl2jax.variants.recipe import Pricing
from exl2jax.variants.solvers import Problem, Solved

WIDEST_STEP = 2.0
"""Bits per weight between neighbouring settings at their widest, from 6 bits to 8."""


def feasible_bpw(
    measurement: Measurement, specs: Sequence[ModuleSpec], pricing: Pricing, table: Table | None = None
) -> tuple[float, float]:
    """Least and greatest bits per weight that allocation by `pricing`, among the rows of `table`, can reach."""
    if by_rows(pricing, table):
        rows = measurement.modules.values()
        low, high = (sum(pick(c.total_bits for c in row) for row in rows) for pick in (min, max))
    else:
        linears = [linear for spec in specs for linear in spec.linears]
        priced = measurement.sensitivity.linears if measurement.sensitivity is not None else {}
        ends = [(priced[x.key].ends if x.key in priced else (NARROWEST, WIDEST)) for x in linears]
        low, high = (
            sum(end[i].total_bits(x.rows, x.columns) for x, end in zip(linears, ends, strict=True)) for i in (0, 1)
        )
    weights = sum(spec.weights for spec in specs)
    return low / weights, high / weights


def by_rows(pricing: Pricing, table: Table | None) -> bool:
    """Whether a module takes a row of a table: it does where one is given, and with stock's accuracies."""
    return pricing == "accuracy" or table is not None


def require_reachable(
    specs: Sequence[ModuleSpec], bits: float, pricing: Pricing, table: Table | None = None, limits: Limits = NO_LIMITS
) -> None:
    """Refuse a target below the cheapest settings before the measurement, which takes hours."""
    reachable_budget(reach(specs, pricing, table, limits), specs, bits)


def reach(
    specs: Sequence[ModuleSpec], pricing: Pricing, table: Table | None = None, limits: Limits = NO_LIMITS
) -> tuple[float, float]:
    """Least and greatest bits per weight of all the settings that the limits allow, before anything is measured.

    Raises `SettingsError` where the limits leave no row of the table for a module.
    """
    if not by_rows(pricing, table):
        linears = [linear for spec in specs for linear in spec.linears]
        ends = [(x, width_ends(limits.widths(x.key))) for x in linears]
        low, high = (sum(end[i].total_bits(x.rows, x.columns) for x, end in ends) for i in (0, 1))
        weights = sum(spec.weights for spec in specs)
        return low / weights, high / weights
    rows = {
        slot.key: tuple(
            Candidate(qparams=row, total_bits=module_bits(slot, row))
            for row in candidate_rows(slot, table or STOCK_TABLE)
        )
        for slot in slots_of(specs)
    }
    return feasible_bpw(limits.apply(Measurement(modules=rows), specs), specs, pricing, table)


def reachable_budget(within: tuple[float, float], specs: Sequence[ModuleSpec], bits: float) -> int:
    """The budget in bits; `MeasurementError` with the feasible range when it is below the least."""
    low, high = within
    weights = sum(spec.weights for spec in specs)
    budget = int(weights * bits)
    if budget < round(low * weights):
        raise MeasurementError(
            f"`bits` {bits}: these candidates reach {low:.4f} to {high:.4f} bits per weight; raise `bits`"
        )
    return budget


def unspent_note(bpw: float, bits: float, specs: Sequence[ModuleSpec], *, rows: bool) -> str | None:
    """A note where an allocation stays further below its target than the step of one linear can explain.

    `rows` says that modules took rows of a table: then a step is that of a module. None where all is spent.
    """
    parts = [slot.weights for slot in slots_of(specs)] if rows else [x.weights for spec in specs for x in spec.linears]
    step = WIDEST_STEP * max(parts) / sum(spec.weights for spec in specs)
    if bits - bpw <= step:
        return None
    return (
        f"only {bpw:.4f} of the {bits:g} bits per weight asked for were spent: the allowed settings reach no further, "
        "or the measurement sees no gain in more"
    )


def allocate(
    measurement: Measurement,
    specs: Sequence[ModuleSpec],
    bits: float,
    *,
    pricing: Pricing,
    solver: Choice,
    seed: int,
    objective: Choice | None = None,
    table: Table | None = None,
) -> Strategy:
    """Choose a setting per linear within `int(weights * bits)` bits.

    By `fisher` and `divergence` every linear takes the mixture of widths that serves the whole best
    (`allocate_by_linear`), or every module a row of `table` where one is given. By `accuracy` every module takes a row
    of its candidates.
    `solver` picks the rows, the default by the proven optimum of the sum of errors; `objective` is what it takes for an
    error, the measured one by default. Raises `MeasurementError` with the feasible range when `bits` cannot be reached.
    """
    if pricing != "accuracy" and table is not None:
        measurement = _priced_rows(measurement, specs, table)
    budget = reachable_budget(feasible_bpw(measurement, specs, pricing, table), specs, bits)
    if not by_rows(pricing, table):
        return _strategy_by_linear(measurement, specs, budget, pricing)
    return _row_strategy(measurement, specs, budget, pricing, solver=solver, seed=seed, objective=objective)


def _priced_rows(measurement: Measurement, specs: Sequence[ModuleSpec], table: Table) -> Measurement:
    """The rows of a table with the summed costs of their linears, those of widths that are not allowed left out."""
    assert measurement.sensitivity is not None  # the callers looked
    costs, found = measurement.sensitivity.linears, {}
    for slot in slots_of(specs):
        linears = [(x.name, costs[x.key]) for x in slot.linears]
        found[slot.key] = tuple(
            Candidate(
                qparams=row,
                total_bits=module_bits(slot, row),
                cost=sum(priced.cost(row[name]) for name, priced in linears),
            )
            for row in candidate_rows(slot, table)
            if all(set(row[name].bits) <= set(priced.widths) for name, priced in linears)
        )
        if not found[slot.key]:
            raise MeasurementError(f"{slot.key}: no row of the candidate table keeps to `pins` and `exclude_bits`")
    return Measurement(modules=found)


def _strategy_by_linear(
    measurement: Measurement, specs: Sequence[ModuleSpec], budget: int, pricing: Pricing
) -> Strategy:
    assert measurement.sensitivity is not None  # the callers looked
    chosen = allocate_by_linear(measurement.sensitivity.linears, budget)
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
    pricing: Pricing,
    *,
    solver: Choice,
    seed: int,
    objective: Choice | None,
) -> Strategy:
    slots = slots_of(specs)
    rows = [measurement.modules[slot.key] for slot in slots]
    problem = Problem(
        costs=[np.asarray([c.total_bits for c in row], np.int64) for row in rows],
        errors=[_errors(row, objective) for row in rows],
        budget=budget,
    )
    solved: Solved = solver.function(problem, seed, solver.settings)
    return Strategy(
        qparams={slot.key: row[i].qparams for slot, row, i in zip(slots, rows, solved.choice, strict=True)},
        total_bits=problem.cost(solved.choice),
        weights=sum(spec.weights for spec in specs),
        objective=problem.objective(solved.choice, solved.norm),
        norm=solved.norm,
        max_error=problem.max_error(solved.choice),
        pricing=pricing,
        solver=solver.name,
        gap=solved.gap,
    )


def _errors(row: Sequence[Candidate], objective: Choice | None) -> np.ndarray:
    """The contribution of each candidate of a module to the sum."""
    errors = np.asarray([candidate.error for candidate in row])
    return errors if objective is None else objective.function(errors, objective.settings)
