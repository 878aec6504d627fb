"""The scale searches against float64 searches: over the same grid, and over every index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exl2jax.ops import search_columns, search_scales
from exl2jax.ops.scales import GRID, MULTIPLIERS, OFFSETS, GroupContext, ScaleChoice
from exl2jax.qparams import FORMAT_BITS
from tests.oracles import scales as oracle
from tests.oracles.rounding import half_scale

COLUMNS = {32: 1, 64: 33, 96: 7, 128: 45}
"""Odd column counts, one per group size: a compilation each."""

search = jax.jit(search_scales)


@jax.jit
def by_column(w: jax.Array, bits: jax.Array, importance: jax.Array | None = None) -> ScaleChoice:
    return search_columns(w, bits, GroupContext(importance))


def weights(rows: int, columns: int, seed: int) -> np.ndarray:
    """Columns of very different spread, with a few outliers."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)) * np.exp2(rng.uniform(-6, 0, columns)) * 0.05
    w[rng.integers(0, rows, 3), rng.integers(0, columns, 3)] *= 4
    return w.astype(np.float32)


def check(w: np.ndarray, bits: int, choice: ScaleChoice) -> None:
    index, q_scale_max, _, multiplier = oracle.search(w, bits)
    step = 0.5 / 96
    assert abs(float(choice.multiplier) - multiplier) <= step * 1.01
    assert np.array_equal(np.asarray(choice.qs), index)
    assert choice.qs.dtype == jnp.uint8
    best, reached = (oracle.grid_loss(w, bits, float(p)) for p in (multiplier, choice.multiplier))
    np.testing.assert_allclose(reached, best, rtol=1e-5)
    assert choice.qscale_max.dtype == jnp.float16
    np.testing.assert_allclose(float(choice.qscale_max), float(q_scale_max), rtol=step / 0.7 * 1.01 + 1e-3)
    assert np.array_equal(np.asarray(choice.scale), half_scale(np.asarray(choice.qscale_max), index).astype(np.float32))


@pytest.mark.parametrize("bits", FORMAT_BITS)
@pytest.mark.parametrize("rows", COLUMNS)
def test_agrees_with_the_float64_search(rows: int, bits: int) -> None:
    for seed in range(3):
        w = weights(rows, COLUMNS[rows], seed)
        check(w, bits, search(w, jnp.float32(bits)))


def test_the_grid() -> None:
    np.testing.assert_allclose(GRID, np.linspace(0.7, 1.2, 97), rtol=1e-6)
    assert GRID.dtype == np.float32


def test_the_widest_column_has_index_16_and_narrow_ones_at_least_1() -> None:
    w = weights(32, 9, 0)
    w[:, 0] = 10 * np.abs(w).max()
    w[:, 1] = 1e-7
    choice = search(w, jnp.float32(4))
    assert int(choice.qs[0]) == 16
    assert int(choice.qs[1]) == 1


@pytest.mark.parametrize("bits", FORMAT_BITS)
def test_a_group_of_zeros_has_scale_zero(bits: int) -> None:
    choice = search(np.zeros((32, 5), np.float32), jnp.float32(bits))
    assert float(choice.qscale_max) == 0
    assert np.array_equal(np.asarray(choice.scale), np.zeros(5))
    assert np.array_equal(np.asarray(choice.qs), np.full(5, 16))


def test_a_column_of_zeros_leaves_the_others_alone() -> None:
    w = weights(32, 5, 4)
    padded = w.copy()
    padded[:, 2] = 0
    check(padded, 4, search(padded, jnp.float32(4)))


def test_huge_weights_stay_finite() -> None:
    """A maximum beyond the largest half is cut there rather than stored as infinity."""
    choice = search(np.full((32, 5), 3e6, np.float32), jnp.float32(4))
    assert float(choice.qscale_max) == 65504
    assert np.isfinite(np.asarray(choice.scale)).all()


def test_maps_over_groups_of_different_widths() -> None:
    w = np.stack([weights(64, 13, seed) for seed in range(len(FORMAT_BITS))])
    choices = jax.jit(jax.vmap(search_scales))(w, jnp.asarray(FORMAT_BITS, jnp.float32))
    for i, bits in enumerate(FORMAT_BITS):
        check(w[i], bits, jax.tree.map(lambda x, i=i: x[i], choices))


def column_losses(w: np.ndarray, bits: int, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's losses at every index, and which of these the search tries."""
    losses = oracle.index_losses(w, bits, MULTIPLIERS, importance)
    base = (np.abs(w.astype(np.float64)).max(axis=0) + 1e-12) / ((2**bits - 1) / 2)
    holds = np.rint(16 * np.sqrt(base / (base.max() * MULTIPLIERS[:, None].astype(np.float64))))
    away = np.arange(1, 17)[:, None] - holds[:, None]
    lowest, highest = (np.clip(holds + x, 1, 16) - holds for x in (OFFSETS[0], OFFSETS[-1]))
    return losses, (away >= lowest[:, None]) & (away <= highest[:, None])


@pytest.mark.parametrize("bits", FORMAT_BITS)
@pytest.mark.parametrize("rows", COLUMNS)
def test_columns_find_their_own_index(rows: int, bits: int) -> None:
    for seed in range(3):
        w = weights(rows, COLUMNS[rows], seed)
        importance = np.random.default_rng(seed).uniform(0.1, 30, rows).astype(np.float32)
        choice = by_column(w, jnp.float32(bits), importance)
        losses, tried = column_losses(w, bits, importance)
        best = np.where(tried, losses, np.inf).min(axis=1).sum(axis=1)
        m = int(np.argmin(np.abs(MULTIPLIERS - float(choice.multiplier))))
        reached = losses[m, np.asarray(choice.qs) - 1, np.arange(w.shape[1])].sum()
        np.testing.assert_allclose([reached, best[m]], best.min(), rtol=1e-5)
        if w.shape[1] > 1:
            assert reached <= 1.05 * losses.min(axis=1).sum(axis=1).min()
        assert (choice.qs.dtype, choice.qscale_max.dtype) == (jnp.uint8, jnp.float16)
        scale = half_scale(np.asarray(choice.qscale_max), np.asarray(choice.qs)).astype(np.float32)
        assert np.array_equal(np.asarray(choice.scale), scale)


@pytest.mark.parametrize("bits", FORMAT_BITS)
def test_columns_lose_less_than_one_multiplier_for_all(bits: int) -> None:
    w = weights(64, 45, bits)
    half = 2 ** (bits - 1)

    def loss(choice: ScaleChoice) -> float:
        step = np.maximum(np.asarray(choice.scale, np.float64), 1e-30)
        return float(np.square(np.clip(np.rint(w / step), -half, half - 1) * step - w).sum())

    assert loss(by_column(w, jnp.float32(bits))) < 0.97 * loss(search(w, jnp.float32(bits)))


def test_columns_of_zeros_and_huge_ones() -> None:
    zeros = by_column(np.zeros((32, 5), np.float32), jnp.float32(3))
    assert float(zeros.qscale_max) == 0 and not np.asarray(zeros.scale).any()
    assert np.isin(np.asarray(zeros.qs), np.arange(1, 17)).all()
    w = weights(32, 5, 4)
    padded = w.copy()
    padded[:, 2] = 0
    with_zeros, without = by_column(padded, jnp.float32(4)), by_column(np.delete(w, 2, axis=1), jnp.float32(4))
    assert np.array_equal(np.delete(np.asarray(with_zeros.qs), 2), np.asarray(without.qs))
    huge = by_column(np.full((32, 5), 3e6, np.float32), jnp.float32(4))
    assert float(huge.qscale_max) == 65504 and np.isfinite(np.asarray(huge.scale)).all()
