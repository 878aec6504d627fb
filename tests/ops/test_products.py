"""Products of linears in float32 and in bfloat16, against float64."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from exl2jax.ops import Products, product

TOKENS, K, N = (2, 16), 192, 96


@pytest.fixture(scope="module")
def factors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((*TOKENS, K)).astype(np.float32), rng.standard_normal((K, N)).astype(np.float32)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_float32_products_are_of_the_stored_weight(factors: tuple[np.ndarray, np.ndarray], stored: type) -> None:
    x, w = factors[0], factors[1].astype(stored)
    got = product(jnp.asarray(x), jnp.asarray(w), Products.FLOAT32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, x.astype(np.float64) @ w.astype(np.float64), atol=2e-4)


def test_bfloat16_rounds_the_factors_and_sums_in_float32(factors: tuple[np.ndarray, np.ndarray]) -> None:
    """The sum is exact to float32 where bfloat16's own steps, 2^-8, would be off by a hundred times the bound."""
    x, w = (values.astype(ml_dtypes.bfloat16) for values in factors)
    got = product(*map(jnp.asarray, factors), Products.BFLOAT16)
    assert got.dtype == jnp.float32
    expected = x.astype(np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert np.abs(expected.astype(ml_dtypes.bfloat16).astype(np.float64) - expected).max() > 2e-2
