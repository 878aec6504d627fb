"""The seeded annealing: legal, repeatable, and close to the optimum where that can be found by trying everything."""

import numpy as np
import pytest

from exl2jax.ops import annealing
from exl2jax.ops.annealing import anneal
from tests.oracles.knapsack import best_loss

SLOTS, OPTIONS, RUNS = 6, 5, 4


@pytest.fixture(autouse=True)
def short_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the proposals, which six slots need no more than."""
    monkeypatch.setattr(annealing, "PROPOSALS", 100)
    monkeypatch.setattr(annealing, "COOLING", 0.95)


def problem(unit: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Padded costs, one row of losses per run, and the number of options of each slot."""
    rng = np.random.default_rng(7)
    counts = rng.integers(2, OPTIONS + 1, SLOTS)
    inside = np.arange(OPTIONS) < counts[:, None]
    costs = np.where(inside, np.sort(rng.integers(20, 90, (SLOTS, OPTIONS)), axis=1) * unit, 0)
    losses = np.where(inside, -np.sort(-rng.random((SLOTS, OPTIONS)), axis=1), 0)
    return costs, np.stack([losses] * RUNS), counts


def total(values: np.ndarray, choice: np.ndarray) -> float:
    return float(values[np.arange(SLOTS), choice].sum())


@pytest.mark.parametrize("unit", [32, 1_000_000_007], ids=["small", "beyond int32"])
def test_choices_are_legal_and_good(unit: int) -> None:
    costs, losses, counts = problem(unit)
    budget = int(costs[:, 0].sum() * 1.4)
    found = anneal(costs, losses, counts, budget, seed=(0, 0))
    assert found.shape == (RUNS, SLOTS)
    assert (found < counts).all()
    assert all(total(costs, choice) <= budget for choice in found)
    rows = [list(range(n)) for n in counts]
    best = best_loss(
        [[int(costs[s, i]) for i in row] for s, row in enumerate(rows)],
        [[float(losses[0, s, i]) for i in row] for s, row in enumerate(rows)],
        budget,
    )
    assert best is not None
    reached = min(total(losses[0], choice) for choice in found)
    assert best - 1e-6 <= reached <= 1.1 * best


def test_the_seed_decides() -> None:
    costs, losses, counts = problem()
    budget = int(costs[:, 0].sum() * 1.3)
    first, again, stage, other = (
        anneal(costs, losses, counts, budget, seed=s) for s in ((3, 0), (3, 0), (3, 1), (4, 0))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, stage)
    assert not np.array_equal(first, other)


def test_runs_are_independent() -> None:
    costs, losses, counts = problem()
    found = anneal(costs, losses, counts, int(costs[:, 0].sum() * 1.3), seed=(3, 0))
    assert len({tuple(choice) for choice in found}) > 1


def test_a_start_over_the_budget_comes_back_under_it() -> None:
    """Where option 0 is the dearest, every first move must lower the cost (stock never made one)."""
    costs, losses, counts = problem()
    for s, n in enumerate(counts):
        costs[s, :n] = costs[s, :n][::-1]
        losses[:, s, :n] = losses[:, s, :n][:, ::-1]
    budget = int(sum(costs[s, : counts[s]].min() for s in range(SLOTS)) * 1.2)
    assert costs[:, 0].sum() > budget
    found = anneal(costs, losses, counts, budget, seed=(0, 0))
    assert all(total(costs, choice) <= budget for choice in found)
