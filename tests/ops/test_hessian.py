"""Hessians: accumulation, order, damping and the factor of the inverse, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exl2jax.ops import accumulate_hessian, factorize, solve
from exl2jax.ops.hessian import lower_inverse
from tests.oracles import hessian as oracle


def correlated(k: int, tokens: int, seed: int) -> np.ndarray:
    """A Hessian of correlated inputs with a few strong channels, as layers of real models have."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, k)) @ (np.eye(k) + 0.3 * rng.standard_normal((k, k)) / np.sqrt(k))
    x[:, rng.integers(0, k, 3)] *= 8
    return (x.T @ x / 10).astype(np.float32)


def indefinite(k: int, factor: float, seed: int) -> np.ndarray:
    """A matrix whose least eigenvalue is minus `factor` times its mean diagonal."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((k, k)))
    values = np.ones(k)
    values[0] = -factor * (k - 1) / (k + factor)
    return ((basis * values) @ basis.T).astype(np.float32)


def inverse_error(u: np.ndarray, h: np.ndarray, damping: float) -> float:
    """Largest entry of `U^T U (H + damping) - 1` in float64."""
    _, ordered = oracle.damped(h, damping)
    wide = np.asarray(u, np.float64)
    return float(np.abs(wide.T @ wide @ ordered - np.eye(len(h))).max())


def test_accumulation_is_a_sum_over_all_tokens() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 2, 9, 24)).astype(np.float32)
    h = accumulate_hessian(accumulate_hessian(jnp.zeros((24, 24)), jnp.asarray(x)), jnp.asarray(y))
    expected = oracle.accumulate(np.concatenate([x, y]))
    np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-5 * expected.max())


def test_accumulation_maps_over_experts() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 17, 8)).astype(np.float32)
    h = jax.jit(jax.vmap(accumulate_hessian))(jnp.ones((3, 8, 8)), jnp.asarray(x))
    for i in range(3):
        np.testing.assert_allclose(h[i], 1 + oracle.accumulate(x[i]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 5, 64, 128, 129, 300])
def test_lower_inverse(k: int) -> None:
    rng = np.random.default_rng(k)
    lower = np.tril(rng.standard_normal((k, k)) / np.sqrt(k)).astype(np.float32) + 2 * np.eye(k, dtype=np.float32)
    got = np.asarray(lower_inverse(jnp.asarray(lower)))
    assert np.array_equal(got, np.tril(got))
    np.testing.assert_allclose(got, np.linalg.inv(lower.astype(np.float64)), atol=1e-5)


@pytest.mark.parametrize("k", [32, 160, 288])
def test_factor_is_that_of_the_permuted_damped_inverse(k: int) -> None:
    h = correlated(k, 3 * k, k)
    factor = factorize(jnp.asarray(h))
    damping = oracle.first_damping(h)
    perm, u = oracle.factorize(h, damping)
    assert bool(factor.ok)
    assert int(factor.attempts) == 1
    np.testing.assert_allclose(float(factor.damping), damping, rtol=1e-5)
    assert np.array_equal(np.asarray(factor.perm), perm)
    assert np.array_equal(perm[np.asarray(factor.inv_perm)], np.arange(k))
    assert np.array_equal(np.asarray(factor.u), np.triu(factor.u))
    assert inverse_error(np.asarray(factor.u), h, damping) < 1e-3
    np.testing.assert_allclose(factor.u, u, rtol=1e-3, atol=1e-4 * u.max())


def test_equal_diagonals_keep_their_order() -> None:
    factor = factorize(2 * jnp.eye(32))
    assert factor.perm.tolist() == list(range(32))


def test_fewer_tokens_than_rows_need_no_second_attempt() -> None:
    h = correlated(64, 8, 3)
    factor = factorize(jnp.asarray(h))
    assert bool(factor.ok)
    assert int(factor.attempts) == 1
    assert inverse_error(np.asarray(factor.u), h, float(factor.damping)) < 1e-2


@pytest.mark.parametrize(("factor", "attempts"), [(0.2, 2), (0.9, 4), (50.0, 10)])
def test_damping_doubles_until_the_matrix_is_definite(factor: float, attempts: int) -> None:
    h = indefinite(64, factor, 5)
    result = factorize(jnp.asarray(h))
    assert bool(result.ok)
    assert int(result.attempts) == attempts
    np.testing.assert_allclose(float(result.damping), oracle.first_damping(h) * 2 ** (attempts - 1), rtol=1e-4)
    assert inverse_error(np.asarray(result.u), h, float(result.damping)) < 1e-2


def test_ten_attempts_and_no_more() -> None:
    result = factorize(jnp.asarray(indefinite(64, 63.9, 6) - 1000 * np.eye(64, dtype=np.float32)))
    assert not bool(result.ok)
    assert int(result.attempts) == 10


def test_zeros_get_the_least_damping() -> None:
    result = factorize(jnp.zeros((40, 40)))
    assert bool(result.ok)
    assert int(result.attempts) == 1
    np.testing.assert_allclose(float(result.damping), 1e-5)
    np.testing.assert_allclose(result.u, np.eye(40) / np.sqrt(1e-5), rtol=1e-5)


def test_a_dead_channel_comes_last_and_stays_apart() -> None:
    h = correlated(48, 200, 7)
    h[11, :] = h[:, 11] = 0
    result = factorize(jnp.asarray(h))
    assert bool(result.ok)
    assert int(result.perm[-1]) == 11
    assert not np.asarray(result.u)[:-1, -1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(3, 3), (20, 4)])
def test_not_finite_is_not_ok(bad: float, place: tuple[int, int]) -> None:
    h = correlated(32, 100, 8)
    h[place] = h[place[::-1]] = bad
    assert not bool(factorize(jnp.asarray(h)).ok)


def test_maps_over_matrices_that_need_different_attempts() -> None:
    stack = np.stack([correlated(64, 200, 9), indefinite(64, 0.9, 5), np.zeros((64, 64), np.float32)])
    broken = np.full((1, 64, 64), np.nan, np.float32)
    results = jax.jit(jax.vmap(factorize))(np.concatenate([stack, broken]))
    assert results.attempts.tolist()[:3] == [1, 4, 1]
    assert results.ok.tolist() == [True, True, True, False]
    for i, h in enumerate(stack):
        alone = factorize(jnp.asarray(h))
        assert np.array_equal(np.asarray(results.perm[i]), np.asarray(alone.perm))
        np.testing.assert_allclose(results.u[i], alone.u, rtol=1e-3, atol=1e-4 * float(alone.u.max()))


def test_solving_with_the_factor() -> None:
    """`(H + l I)^-1 B` against a float64 solve; inputs that are never active are counted."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((200, 48))
    x[:, [3, 17]] = 0
    h = (x.T @ x).astype(np.float32)
    factor, b = factorize(jnp.asarray(h)), rng.standard_normal((48, 5)).astype(np.float32)
    expected = np.linalg.solve(h.astype(np.float64) + float(factor.damping) * np.eye(48), b)
    np.testing.assert_allclose(solve(factor, jnp.asarray(b)), expected, rtol=1e-3, atol=1e-6)
    assert int(factor.dead) == 2
    assert bool(factor.finite) and not bool(factorize(jnp.asarray(h).at[0, 0].set(jnp.nan)).finite)
