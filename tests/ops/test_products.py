"""Products of linears in float32 and in bfloat16, and sums over tokens, against float64; who takes which precision."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from exl2jax.ops import (
    Products,
    WalkOptions,
    factorize,
    gptq_arrays,
    gram,
    group_table,
    product,
    proxy_loss,
    solve,
    sum_over_tokens,
)
from exl2jax.qparams import q

TOKENS, K, N = (2, 16), 192, 96

TF32 = 2.0**-10
"""The relative error of a factor whose last 13 bits are cut off, at most."""


def cut(x: np.ndarray) -> np.ndarray:
    """Float32 values as a TF32 unit reads them at worst: their last 13 bits gone."""
    return (np.asarray(x, np.float32).view(np.uint32) >> 13 << 13).view(np.float32)


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


def test_sums_over_tokens() -> None:
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((500, n)).astype(np.float32) for n in (70, 30))
    wanted, size = x.T.astype(np.float64) @ y, np.abs(x).T.astype(np.float64) @ np.abs(y)
    np.testing.assert_array_less(np.abs(sum_over_tokens(jnp.asarray(x), jnp.asarray(y)) - wanted), 1e-6 * size)
    assert np.abs(cut(x).T.astype(np.float64) @ cut(y) - wanted).max() < 2.01 * TF32 * size.max()


@pytest.mark.parametrize("seed", range(4))
def test_the_gram_matrix_of_rounded_inputs_has_a_factor(seed: int) -> None:
    """Rounded factors are rounded inputs: no eigenvalue is below zero but for the error of the sums themselves."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((150, 48)) * 10 ** rng.uniform(-3, 3, 48)).astype(np.float32)
    h, exact = np.asarray(gram(jnp.asarray(cut(x)))) / len(x), x.T.astype(np.float64) @ x / len(x)
    assert np.linalg.eigvalsh(h.astype(np.float64)).min() > -1e-6 * h.diagonal().max()
    scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert np.abs((h - exact) / scale).max() < 2.01 * TF32
    assert bool(factorize(jnp.asarray(h)).ok)


def test_a_difference_formed_before_the_product_keeps_its_accuracy() -> None:
    """`X^T (Y - X)` of TF32 factors is as near as they are; a difference of two such products would not be."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((400, 30)).astype(np.float32)
    y = x + np.float32(1e-3) * rng.standard_normal(x.shape).astype(np.float32)
    wanted = x.T.astype(np.float64) @ (y.astype(np.float64) - x)
    before = cut(x).T.astype(np.float64) @ cut(y - x)
    after = cut(x).T.astype(np.float64) @ cut(y) - cut(x).T.astype(np.float64) @ cut(x)
    least = np.linalg.norm(wanted)
    assert np.linalg.norm(before - wanted) < 2 * TF32 * least < 0.02 * np.linalg.norm(after - wanted)


def precisions(run: Callable[..., Any], *values: Any) -> set[str]:
    """The precisions of all products in a program."""
    return set(re.findall(r"precision = (\[\w+, \w+\])", jax.jit(run).lower(*values).as_text()))


def test_only_sums_over_tokens_take_the_default_of_the_device() -> None:
    square, w = jnp.eye(256), jnp.ones((256, 32))
    factor, table = factorize(square), jnp.asarray(group_table(q("4", "1", "32").groups(256), 256))
    walk = partial(gptq_arrays, factor=factor, table=table, options=WalkOptions())
    for full in (precisions(walk, w), precisions(solve, factor, w), precisions(proxy_loss, square, w)):
        assert full == {"[HIGHEST, HIGHEST]"}
    assert precisions(factorize, square) == {"[HIGHEST, HIGHEST]"}
    assert precisions(sum_over_tokens, w, w) == precisions(gram, w) == {"[DEFAULT, DEFAULT]"}
