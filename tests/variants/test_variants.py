"""Variants on matrices: each against plain NumPy, or against the loss that it is meant to lower."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from exl2jax.errors import SettingsError
from exl2jax.ops import gptq
from exl2jax.qparams import q
from exl2jax.variants import KINDS, STOCK, NoSettings, Quantizer, choose, find, names, variant
from tests.oracles.gptq import proxy_loss
from tests.oracles.rounding import quantize

ROWS, COLUMNS = 96, 40
GROUPS = q("5/3", ".3/.7", "32").groups(ROWS)


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray]:
    """A weight and a Hessian whose inputs are correlated and of very different size."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((400, ROWS)) @ (np.eye(ROWS) + 0.2 * rng.standard_normal((ROWS, ROWS)))
    x *= np.exp(rng.standard_normal(ROWS))
    w = 0.05 * rng.standard_normal((ROWS, COLUMNS))
    return w.astype(np.float32), (x.T @ x / 4).astype(np.float32)


def quantizer(**choices: str) -> Quantizer:
    return Quantizer.of([choose(kind, text) for kind, text in choices.items()])


def quantized(problem: tuple[np.ndarray, np.ndarray], **choices: str):
    w, h = problem
    chosen = quantizer(**choices)
    factor = chosen.factorize(jnp.asarray(h))
    assert bool(factor.ok)
    return chosen.quantize(jnp.asarray(w), factor, GROUPS), factor


def damped_loss(problem: tuple[np.ndarray, np.ndarray], linear, factor) -> float:
    w, h = problem
    return proxy_loss(h + float(factor.damping) * np.eye(ROWS), w, np.asarray(linear.weight, np.float64))


def test_the_plain_walk_is_gptq(problem: tuple[np.ndarray, np.ndarray]) -> None:
    w, _ = problem
    plain, factor = quantized(problem, scales="grid")  # stock's own grid, as a plain function
    tuned = gptq(jnp.asarray(w), factor, GROUPS)
    assert np.mean(np.asarray(plain.codes) == np.asarray(tuned.codes)) > 0.98
    assert damped_loss(problem, plain, factor) == pytest.approx(damped_loss(problem, tuned, factor), rel=0.02)
    assert np.array_equal(plain.qscale_max, tuned.qscale_max)


def test_nearest_rounds_every_weight_for_itself(problem: tuple[np.ndarray, np.ndarray]) -> None:
    w, _ = problem
    linear, factor = quantized(problem, rounding="nearest")
    ordered = np.asarray(w, np.float64)[np.asarray(factor.perm)]
    for g, group in enumerate(GROUPS):
        scale = np.float64(linear.qscale_max[g]) / 256 * np.asarray(linear.qs[g], np.float64) ** 2
        part = slice(group.start, group.start + group.rows)
        wanted = np.asarray([quantize(row, scale, group.bits) for row in ordered[part]])
        assert np.mean(np.asarray(linear.codes[part]) == wanted) > 0.98, "apart from half-precision ties"


@pytest.mark.parametrize("rounding", ["descent", "descent:sweeps=4", "refit"])
def test_what_follows_gptq_lowers_its_loss(problem: tuple[np.ndarray, np.ndarray], rounding: str) -> None:
    before = damped_loss(problem, *quantized(problem, scales="grid"))
    after = damped_loss(problem, *quantized(problem, scales="grid", rounding=rounding))
    nearest = damped_loss(problem, *quantized(problem, rounding="nearest"))
    assert after < before < nearest


def numpy_search(w: np.ndarray, bits: int, weight: np.ndarray, power: float) -> float:
    """The multiplier of least loss, in float64."""
    base = (np.abs(w).max(0) + 1e-12) / ((2**bits - 1) / 2)
    qs = np.clip(np.rint(np.sqrt(base / base.max()) * 16), 1, 16)
    scale = (qs / 16) ** 2 * base.max()
    losses = []
    grid = np.linspace(0.7, 1.2, 97)
    for p in grid:
        error = np.clip(np.rint(w / (scale * p)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale * p - w
        losses.append((weight[:, None] * np.abs(error) ** power).sum())
    return float(grid[int(np.argmin(losses))])


@pytest.mark.parametrize(("text", "power", "weighs"), [("grid:power=2", 2, False), ("weighted", 3.5, True)])
def test_scale_searches_find_the_least_loss(
    problem: tuple[np.ndarray, np.ndarray], text: str, power: float, weighs: bool
) -> None:
    w = problem[0][:32]
    importance = np.exp(np.random.default_rng(1).standard_normal(32)).astype(np.float32)
    choice = choose("scales", text)
    found = choice.function(jnp.asarray(w), jnp.float32(3), jnp.asarray(importance), choice.settings)
    wanted = numpy_search(w.astype(np.float64), 3, importance if weighs else np.ones(32), power)
    assert float(found.multiplier) == pytest.approx(wanted, abs=0.011)


def test_orders(problem: tuple[np.ndarray, np.ndarray]) -> None:
    diagonal = np.diagonal(problem[1])
    for name in names("order"):
        perm = np.asarray(quantizer(order=name).factorize(jnp.asarray(problem[1])).perm)
        assert sorted(perm.tolist()) == list(range(ROWS))
    stock, none, group = (choose("order", n) for n in ("stock", "none", "group"))
    by = {c.name: np.asarray(c.function(jnp.asarray(diagonal), c.settings)) for c in (stock, none, group)}
    assert np.array_equal(by["stock"], np.argsort(-diagonal, kind="stable"))
    assert np.array_equal(by["none"], np.arange(ROWS))
    blocks = by["group"].reshape(-1, 32)
    assert (np.diff(blocks, axis=1) == 1).all() and (blocks[:, 0] % 32 == 0).all()
    means = diagonal[blocks].mean(axis=1)
    assert (np.diff(means) <= 0).all()


def test_dampings(problem: tuple[np.ndarray, np.ndarray]) -> None:
    _, h = problem
    mean, smallest = np.mean(np.diagonal(h)), np.linalg.eigvalsh(h.astype(np.float64))[0]
    assert float(quantizer(damping="growing:share=0.001").factorize(jnp.asarray(h)).damping) == pytest.approx(
        0.001 * mean
    )
    lifted = float(quantizer(damping="eigenvalue:share=0.05").factorize(jnp.asarray(h)).damping)
    assert smallest + lifted == pytest.approx(0.05 * mean, rel=1e-3)
    singular = jnp.asarray(np.outer(np.ones(ROWS), np.ones(ROWS)), jnp.float32)
    factor = quantizer(damping="growing:share=1e-9").factorize(singular)
    assert bool(factor.ok) and int(factor.attempts) >= 1


def test_any_order_and_damping_give_a_factor_of_the_inverse(problem: tuple[np.ndarray, np.ndarray]) -> None:
    _, h = problem
    for order in names("order"):
        for damping in names("damping"):
            factor = quantizer(order=order, damping=damping).factorize(jnp.asarray(h))
            perm, u = np.asarray(factor.perm), np.asarray(factor.u, np.float64)
            damped = h[perm][:, perm] + float(factor.damping) * np.eye(ROWS)
            assert np.allclose(u.T @ u @ damped, np.eye(ROWS), atol=2e-2), (order, damping)
            assert np.array_equal(perm[np.asarray(factor.inv_perm)], np.arange(ROWS))


def test_objectives() -> None:
    errors = np.asarray([0.5, 0.1, 0.01, 0.0])
    wanted = {"stock": errors, "squared": errors**2, "logs": np.log(np.maximum(errors, 1e-4) / 1e-4)}
    for name, losses in wanted.items():
        choice = choose("objective", name)
        assert np.allclose(choice.function(errors, choice.settings), losses)
    minimax = choose("objective", "minimax")
    losses = minimax.function(errors, minimax.settings)
    assert losses[0] > 1e10 * losses[1] > 0


def test_stock_is_the_default_and_costs_nothing() -> None:
    assert Quantizer.of([]) == STOCK and hash(STOCK) == hash(Quantizer())
    assert quantizer(scales="stock", order="stock", rounding="stock", damping="stock") == STOCK
    defaults = dict.fromkeys(KINDS, "stock") | {"solver": "exact", "tuning": "none", "transform": "none"}
    assert {kind: names(kind)[0] for kind in KINDS} == defaults


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("scale", "grid", "there is no kind of variant 'scale'"),
        ("scales", "grit", "scales is 'grit'; it must be one of stock, columns, grid,"),
        ("scales", "grid:powr=2", "no setting 'powr'; there are: power, low, high, steps"),
        ("scales", "grid:power=two", "power is 'two'; it must be like 3.5"),
        ("scales", "grid:low=2", "0 < low < high"),
        ("order", "group:rows=33", "multiple of 32"),
        ("order", "none:rows=32", "there are: none"),
    ],
)
def test_wrong_choices_are_named(kind: str, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        choose(kind, text)


def test_what_cannot_be_registered() -> None:
    @dataclass
    class Loose:
        x: int = 1

    with pytest.raises(SettingsError, match="no such kind"):
        variant("colour", "red")(lambda: None)
    with pytest.raises(SettingsError, match="needs a docstring"):
        variant("order", "mine")(lambda diagonal, settings: diagonal)

    def documented(diagonal: object, settings: NoSettings) -> object:
        """Something."""

    with pytest.raises(SettingsError, match="frozen dataclass"):
        variant("order", "mine", Loose)(documented)
    for kind in KINDS:
        assert all(find(kind, name).summary for name in names(kind))


@pytest.mark.parametrize("choices", [{"rounding": "nearest"}, {"rounding": "descent"}, {"scales": "grid"}])
def test_tile_losses_sum_to_the_weighted_error(problem: tuple[np.ndarray, np.ndarray], choices: dict[str, str]) -> None:
    w, h = problem
    chosen, weight = quantizer(**choices), np.linspace(0.5, 2, COLUMNS, dtype=np.float32)
    linear, factor = quantized(problem, **choices)
    (tiles,) = chosen.tile_losses(jnp.asarray(w), factor, (GROUPS,), jnp.asarray(weight))
    error = np.asarray(linear.weight, np.float64) - w
    expected = np.sum(weight * np.einsum("kn,kl,ln->n", error, np.asarray(h, np.float64), error))
    assert tiles.shape == (ROWS // 32,)
    # The errors of a walk count as uncorrelated.
    assert float(jnp.sum(tiles)) == pytest.approx(expected, rel=0.06 if "scales" in choices else 2e-3)


def test_tile_losses_of_stocks_own_grid_are_stocks(problem: tuple[np.ndarray, np.ndarray]) -> None:
    w, weight = jnp.asarray(problem[0]), jnp.ones(COLUMNS)
    factor = STOCK.factorize(jnp.asarray(problem[1]))
    plain, tuned = (q.tile_losses(w, factor, (GROUPS,), weight)[0] for q in (quantizer(scales="grid"), STOCK))
    np.testing.assert_allclose(plain, tuned, rtol=0.1)
