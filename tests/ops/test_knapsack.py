"""The exact solver against trying everything, and at the size of a large model."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2jax.ops.knapsack import Solution, solve
from tests.oracles.knapsack import best_loss

slots = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=4), min_size=1, max_size=5
)


def check(solution: Solution, costs: list[np.ndarray], losses: list[np.ndarray], budget: int) -> None:
    """A solution's own figures are those of its choice."""
    assert solution.cost == sum(int(c[i]) for c, i in zip(costs, solution.choice, strict=True)) <= budget
    np.testing.assert_allclose(solution.loss, sum(x[i] for x, i in zip(losses, solution.choice, strict=True)))


@settings(max_examples=300, deadline=None)
@given(slots, st.integers(1, 200), st.sampled_from([1.0, 1 / 3, 1e-9, 1e4, 1e-30, 1e30]))
def test_the_optimum_by_trying_everything(options: list[list[tuple[int, int]]], budget: int, scale: float) -> None:
    """Small integers make equal costs and equal losses common; the scale keeps losses from being integers."""
    costs = [np.asarray([c for c, _ in slot], np.int64) for slot in options]
    losses = [np.asarray([scale * v for _, v in slot]) for slot in options]
    expected = best_loss(costs, losses, budget)
    solution = solve(costs, losses, budget)
    if expected is None:
        assert solution is None
        return
    assert solution is not None
    check(solution, costs, losses, budget)
    np.testing.assert_allclose(solution.loss, expected, rtol=1e-9, atol=1e-15 * scale)
    assert solution.gap == 0


def model_like(slots: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Options as a measurement has them: costs of 2 to 8 bits on unequal matrices, errors that fall fourfold a bit."""
    rng = np.random.default_rng(seed)
    costs, losses = [], []
    for _ in range(slots):
        weights = int(rng.integers(1, 9)) * 884_736
        bits = np.sort(rng.uniform(2.1, 8.1, 18))
        costs.append((weights * bits).astype(np.int64))
        losses.append(rng.lognormal(0, 1) * 2.0 ** (-2 * bits) * rng.lognormal(0, 0.3, 18))
    return costs, losses


def test_two_hundred_slots_take_under_two_seconds() -> None:
    for seed, bits in enumerate((2.5, 3.0, 4.125, 6.0)):
        costs, losses = model_like(200, seed)
        budget = int(bits * sum(int(c[-1]) for c in costs) / 8.1)
        begun = time.process_time()
        solution = solve(costs, losses, budget)
        assert time.process_time() - begun < 2
        assert solution is not None
        check(solution, costs, losses, budget)
        assert solution.gap <= 1e-6 * solution.loss


def test_nothing_fits() -> None:
    costs, losses = [np.asarray([5, 9])] * 2, [np.asarray([1.0, 0.0])] * 2
    assert solve(costs, losses, 9) is None
    cheapest = solve(costs, losses, 10)
    assert cheapest is not None
    assert cheapest.choice == (0, 0)


def test_a_budget_for_everything_takes_the_least_losses() -> None:
    costs, losses = model_like(20, 1)
    solution = solve(costs, losses, sum(int(c.max()) for c in costs))
    assert solution is not None
    assert solution.choice == tuple(int(np.argmin(x)) for x in losses)
