"""The best mixture of widths within a matrix against every mixture there is, and the allocation by linear."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exl2jax.allocate.by_linear import NARROWEST, allocate_by_linear
from exl2jax.allocate.mixtures import Mixture, _shares, best_mixtures
from exl2jax.measure.sensitivity import MEASURED, LinearCosts, Setting
from exl2jax.qparams import FORMAT_BITS, ROW_MULTIPLE, QParams

COLUMNS = 64


def linear(tiles: int, seed: int, columns: int = COLUMNS) -> LinearCosts:
    """Costs that fall along the rows and with the width, with some noise."""
    rng = np.random.default_rng(seed)
    weight = np.sort(rng.lognormal(-2, 1.5, tiles))[::-1]
    measured = {
        (bits, size): weight * 4.0**-bits * (1.0 if size == 128 else 0.8) * rng.uniform(0.9, 1.1, tiles)
        for bits, size in MEASURED
    }
    return LinearCosts(rows=tiles * ROW_MULTIPLE, columns=columns, measured=measured)


def every_mixture(tiles: int, after: Setting | None = None) -> Iterator[list[tuple[Setting, int]]]:
    """All sequences of groups that the format allows: `(setting, tiles)` with widths that only fall."""
    if tiles == 0:
        yield []
        return
    for bits in FORMAT_BITS:
        for size in (32, 64, 128):
            if after is None or bits < after[0] or (bits, size) == after:
                taken = min(size // ROW_MULTIPLE, tiles)
                for rest in every_mixture(tiles - taken, (bits, size)):
                    yield [((bits, size), taken), *rest]


def price_of(groups: list[tuple[Setting, int]], costs: LinearCosts, price: float) -> float:
    """Cost plus price times bits of a sequence of groups, from the format's own bit count."""
    table, total, t = costs.costs(), 0.0, 0
    for setting, taken in groups:
        bits = taken * 32 * setting[0] * costs.columns + 16 + 32 + 4 * costs.columns
        total += table[setting][t : t + taken].sum() + price * bits
        t += taken
    return float(total)


def value(mixture: Mixture, costs: LinearCosts, price: float) -> float:
    return mixture.cost + price * (mixture.total_bits - 32 * costs.rows)


@pytest.mark.parametrize("total", [*range(1, 200), 344, 512, 896, 2048])
def test_shares_of_any_tiles_come_back_as_these_tiles(total: int) -> None:
    for first in range(1, total):
        shares = _shares([first, total - first])
        qparams = QParams(bits=(4, 3), bits_prop=shares, group_size=(32, 32))
        assert sum(g.rows for g in qparams.groups(total * ROW_MULTIPLE) if g.bits == 4) == first * ROW_MULTIPLE


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5])
def test_no_mixture_is_better(tiles: int) -> None:
    costs = linear(tiles, seed=tiles)
    prices = np.geomspace(1e-10, 1e-4, 7)
    for price, found in zip(prices, best_mixtures([costs], prices)[0], strict=True):
        best = min(price_of(groups, costs, price) for groups in every_mixture(tiles))
        assert value(found, costs, price) == pytest.approx(best, rel=1e-9)


@example(50, 75, -5.125)  # 7 of 50 tiles: 1600 * 0.14 is a little more than 224
@given(st.integers(1, 60), st.integers(0, 10**6), st.floats(-11, -3))
@settings(max_examples=40, deadline=None)
def test_a_mixture_is_a_setting_of_the_format(tiles: int, seed: int, exponent: float) -> None:
    """Its groups cover the rows, widths fall, and bits and cost are those of the groups that `QParams` cuts."""
    costs = linear(tiles, seed)
    ((found,),) = best_mixtures([costs], np.asarray([10.0**exponent]))
    groups = found.qparams.groups(costs.rows)
    assert sum(g.rows for g in groups) == costs.rows
    assert found.total_bits == found.qparams.total_bits(costs.rows, COLUMNS)
    size_of = dict(zip(found.qparams.bits, found.qparams.group_size, strict=True))
    table = costs.costs()
    cost = sum(table[g.bits, size_of[g.bits]][g.start // 32 : (g.start + g.rows) // 32].sum() for g in groups)
    assert found.cost == pytest.approx(cost, rel=1e-9)
    assert costs.cost(found.qparams) == pytest.approx(cost, rel=1e-9)


def test_allocation_by_linear_spends_the_budget_and_proves_its_gap() -> None:
    linears = {f"l{i}": linear(6 + i % 3 * 6, seed=i, columns=64 * (1 + i % 2)) for i in range(40)}
    weights = sum(x.rows * x.columns for x in linears.values())
    before = np.inf
    for bits in (2.5, 3.0, 4.0, 6.0):
        chosen = allocate_by_linear(linears, int(bits * weights))
        spent = sum(m.total_bits for m in chosen.mixtures.values())
        cost = sum(m.cost for m in chosen.mixtures.values())
        assert list(chosen.mixtures) == list(linears)
        assert bits * weights * 0.995 < spent <= bits * weights
        assert 0 <= chosen.gap < 0.02 * cost
        assert cost < before
        before = cost


def scaled(costs: LinearCosts, scale: float, zeros: int, ties: bool) -> LinearCosts:
    """Costs of another scale, the first tiles free of cost, or all tiles and widths of one cost."""
    measured = {}
    for setting, tiles in costs.measured.items():
        values = np.full_like(tiles, scale) if ties else tiles * scale
        values[:zeros] = 0.0
        measured[setting] = values
    return replace(costs, measured=measured)


@example(exponent=-30.0, bits=4.0, zeros=0, ties=False, seed=0)
@example(exponent=30.0, bits=4.0, zeros=0, ties=False, seed=0)
@example(exponent=-15.0, bits=4.0, zeros=0, ties=False, seed=0)
@example(exponent=0.0, bits=4.0, zeros=99, ties=False, seed=0)
@given(
    exponent=st.floats(-30, 30),
    bits=st.floats(2.7, 8.2),
    zeros=st.sampled_from([0, 0, 2, 99]),
    ties=st.booleans(),
    seed=st.integers(0, 50),
)
@settings(max_examples=15, deadline=None)
def test_the_budget_is_spent_whatever_the_scale_of_costs(
    exponent: float, bits: float, zeros: int, ties: bool, seed: int
) -> None:
    plain = {f"l{i}": linear(4 + 4 * (i % 2), seed=seed + i) for i in range(6)}
    linears = {key: scaled(x, 10.0**exponent, zeros, ties) for key, x in plain.items()}
    weights = sum(x.rows * x.columns for x in linears.values())
    chosen = allocate_by_linear(linears, int(bits * weights))
    spent = sum(m.total_bits for m in chosen.mixtures.values())
    step = max(x.rows * x.columns for x in linears.values()) * 2.0
    assert bits * weights - step <= spent <= bits * weights
    assert chosen.gap >= 0


def test_the_choice_follows_the_scale_of_costs() -> None:
    """Costs a million million times smaller are allocated by just the same."""
    linears = {f"l{i}": linear(6 + i % 3 * 6, seed=i) for i in range(9)}
    budget = 4 * sum(x.rows * x.columns for x in linears.values())
    ordinary = allocate_by_linear(linears, budget)
    for scale in (1e-15, 1e12):
        other = allocate_by_linear({k: scaled(x, scale, 0, False) for k, x in linears.items()}, budget)
        assert {k: m.qparams for k, m in other.mixtures.items()} == {k: m.qparams for k, m in ordinary.mixtures.items()}


def test_allocation_by_linear_at_both_ends() -> None:
    linears = {f"l{i}": linear(8, seed=i) for i in range(3)}
    least = sum(NARROWEST.total_bits(x.rows, x.columns) for x in linears.values())
    assert all(m.qparams.bits == (2,) for m in allocate_by_linear(linears, least).mixtures.values())
    most = allocate_by_linear(linears, 10**9).mixtures.values()
    assert all(m.qparams.bits == (8,) for m in most)


def test_derived_settings_lie_between_the_measured_ones() -> None:
    costs = linear(5, seed=1).costs()
    assert list(costs) == [(b, g) for b in (8, 6, 5, 4, 3, 2) for g in (32, 64, 128)]
    for bits in FORMAT_BITS:
        np.testing.assert_allclose(costs[bits, 64] ** 2, costs[bits, 32] * costs[bits, 128])
    for setting in ((8, 128), (6, 32)):
        assert (costs[setting] < costs[5, setting[1]]).all()
