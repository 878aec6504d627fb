"""Allocation over a measurement: the exact optimum, never worse than annealing, and targets out of reach."""

from pathlib import Path

import numpy as np
import pytest

from exl2jax.allocate.allocate import allocate, feasible_bpw, reach, require_reachable, unspent_note
from exl2jax.allocate.limits import Limits
from exl2jax.errors import MeasurementError, SettingsError
from exl2jax.measure.measurement import Candidate, Measurement, candidate_rows, module_bits, read_measurement
from exl2jax.models import ModuleSpec, module_specs, open_model
from exl2jax.ops import annealing
from exl2jax.variants import choose, solvers
from tests.oracles.knapsack import best_loss


@pytest.fixture(scope="module")
def specs(tiny_llama: Path) -> tuple[ModuleSpec, ...]:
    return module_specs(open_model(tiny_llama).config)


@pytest.fixture(scope="module")
def measurement(specs: tuple[ModuleSpec, ...]) -> Measurement:
    """Errors that fall with the bits, with the noise that makes some candidates worse than cheaper ones."""
    rng = np.random.default_rng(0)

    def candidates(spec: ModuleSpec) -> tuple[Candidate, ...]:
        level = rng.lognormal(-1, 0.5)
        out = []
        for row in candidate_rows(spec):
            bits = module_bits(spec, row)
            error = level * 2.0 ** (-1.5 * bits / spec.weights) * rng.lognormal(0, 0.2)
            out.append(Candidate(qparams=row, total_bits=bits, accuracy=1 - min(error, 0.9)))
        return tuple(out)

    return Measurement(modules={spec.key: candidates(spec) for spec in specs})


@pytest.fixture
def short_annealing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annealing, "PROPOSALS", 50)
    monkeypatch.setattr(annealing, "COOLING", 0.9)
    monkeypatch.setattr(solvers, "RUNS", 4)


def total_error(measurement: Measurement, qparams: object) -> float:
    """Sum over the modules of the error of the candidate that was chosen, found again by its settings."""
    assert isinstance(qparams, dict)
    return sum(next(c.error for c in rows if c.qparams == qparams[key]) for key, rows in measurement.modules.items())


@pytest.mark.parametrize("bits", [3.6, 4.125, 5.5, 8.0])
def test_exact_is_the_optimum(measurement: Measurement, specs: tuple[ModuleSpec, ...], bits: float) -> None:
    strategy = allocate(measurement, specs, bits, pricing="accuracy", solver=choose("solver", "exact"), seed=0)
    rows = list(measurement.modules.values())
    weights = sum(spec.weights for spec in specs)
    best = best_loss(
        [[c.total_bits for c in row] for row in rows], [[c.error for c in row] for row in rows], int(bits * weights)
    )
    assert best is not None
    assert total_error(measurement, strategy.qparams) == pytest.approx(best, rel=1e-9)
    assert strategy.gap == 0
    assert strategy.bpw == strategy.total_bits / weights <= bits


def test_bits_that_no_step_explains_are_named(specs: tuple[ModuleSpec, ...]) -> None:
    linears = [linear.weights for spec in specs for linear in spec.linears]
    step = 2 * max(linears) / sum(linears)
    assert unspent_note(4.0 - 0.99 * step, 4.0, specs, rows=False) is None
    assert "only 2.2400 of the 4 bits per weight" in str(unspent_note(2.24, 4.0, specs, rows=False))
    assert unspent_note(4.0 - 1.01 * step, 4.0, specs, rows=True) is None  # a module is more than a linear


def test_limits_count_before_anything_is_measured(specs: tuple[ModuleSpec, ...]) -> None:
    pinned = Limits.parse(["*=8"], [])
    assert reach(specs, "fisher", None, pinned)[0] > 8
    with pytest.raises(MeasurementError, match=r"these candidates reach 8\."):
        require_reachable(specs, 4.0, "fisher", None, pinned)
    with pytest.raises(SettingsError, match="keeps to `pins` and `exclude_bits`"):
        reach(specs, "accuracy", None, Limits.parse(["*.q_proj=2"], [2, 3]))


def test_what_a_strategy_says_is_what_it_chose(measurement: Measurement, specs: tuple[ModuleSpec, ...]) -> None:
    strategy = allocate(measurement, specs, 4.0, pricing="accuracy", solver=choose("solver", "exact"), seed=0)
    assert list(strategy.qparams) == [spec.key for spec in specs]
    assert strategy.total_bits == sum(module_bits(spec, strategy.qparams[spec.key]) for spec in specs)
    assert strategy.objective == pytest.approx(total_error(measurement, strategy.qparams))


@pytest.mark.usefixtures("short_annealing")
@pytest.mark.parametrize("bits", [3.7, 4.5])
def test_exact_is_never_worse_than_annealing(
    measurement: Measurement, specs: tuple[ModuleSpec, ...], bits: float
) -> None:
    annealed = allocate(measurement, specs, bits, pricing="accuracy", solver=choose("solver", "annealing"), seed=1)
    exact = allocate(measurement, specs, bits, pricing="accuracy", solver=choose("solver", "exact"), seed=1)
    assert annealed.bpw <= bits
    assert total_error(measurement, exact.qparams) <= total_error(measurement, annealed.qparams) + 1e-12
    assert annealed.gap is None
    assert 1.4 <= annealed.norm <= 3.6


@pytest.mark.usefixtures("short_annealing")
def test_annealing_repeats_under_its_seed(measurement: Measurement, specs: tuple[ModuleSpec, ...]) -> None:
    first, second = (
        allocate(measurement, specs, 4.0, pricing="accuracy", solver=choose("solver", "annealing"), seed=5)
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("solver", ["exact", "annealing"])
def test_out_of_reach_is_refused_with_the_range(
    measurement: Measurement, specs: tuple[ModuleSpec, ...], solver: str
) -> None:
    low, high = feasible_bpw(measurement, specs, "accuracy")
    weights = sum(spec.weights for spec in specs)
    cheapest = sum(min(c.total_bits for c in rows) for rows in measurement.modules.values())
    assert low == cheapest / weights
    with pytest.raises(MeasurementError, match=rf"`bits` 2\.1: .* reach {low:.4f} to {high:.4f} bits per weight"):
        allocate(measurement, specs, 2.1, pricing="accuracy", solver=choose("solver", solver), seed=0)


def test_the_least_reachable_target_is_reached(measurement: Measurement, specs: tuple[ModuleSpec, ...]) -> None:
    low, _ = feasible_bpw(measurement, specs, "accuracy")
    strategy = allocate(measurement, specs, low + 1e-9, pricing="accuracy", solver=choose("solver", "exact"), seed=0)
    assert strategy.bpw == pytest.approx(low)


def test_the_stock_measurement_of_the_demo_model(demo_model: Path, shared: Path) -> None:
    """Sixty modules of a real model: read as stock wrote them, allocated to within 0.01 bits and proven optimal."""
    specs = module_specs(open_model(demo_model).config)
    measurement = read_measurement(shared / "data" / "golden" / "stock_measurement_smollm2.json", specs)
    assert len(measurement.modules) == 60
    for bits in (3.0, 4.0):
        strategy = allocate(measurement, specs, bits, pricing="accuracy", solver=choose("solver", "exact"), seed=0)
        assert bits - 0.01 < strategy.bpw <= bits
        assert strategy.gap is not None
        assert strategy.gap <= 1e-6 * strategy.objective
