"""Error measures against their definitions in float64."""

import jax
import numpy as np

from exl2jax.ops import proxy_loss, relative_frobenius
from tests.oracles import gptq as oracle


def test_relative_frobenius_over_the_last_two_axes() -> None:
    rng = np.random.default_rng(0)
    out, ref = rng.standard_normal((2, 3, 5, 7, 11)).astype(np.float32)
    expected = [
        [np.linalg.norm(o - r) / np.linalg.norm(r) for o, r in zip(a, b, strict=True)]
        for a, b in zip(out, ref, strict=True)
    ]
    got = relative_frobenius(jax.numpy.asarray(out), jax.numpy.asarray(ref))
    assert got.shape == (3, 5)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_relative_frobenius_of_equal_arrays_is_zero() -> None:
    x = jax.numpy.ones((4, 4))
    assert float(relative_frobenius(x, x)) == 0.0


def test_proxy_loss_is_the_expected_output_error() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 16)).astype(np.float32)
    w, error = rng.standard_normal((2, 16, 9)).astype(np.float32)
    h = x.T @ x
    got = jax.jit(proxy_loss)(h, error)
    np.testing.assert_allclose(got, oracle.proxy_loss(h, w, w + error), rtol=1e-4)
    np.testing.assert_allclose(got, np.linalg.norm(x.astype(np.float64) @ error) ** 2, rtol=1e-4)


def test_both_map_over_a_leading_axis() -> None:
    rng = np.random.default_rng(2)
    h = rng.standard_normal((3, 8, 8)).astype(np.float32)
    e = rng.standard_normal((3, 8, 4)).astype(np.float32)
    np.testing.assert_allclose(
        jax.vmap(proxy_loss)(h, e),
        [oracle.proxy_loss(a, np.zeros((8, 4)), b) for a, b in zip(h, e, strict=True)],
        rtol=1e-4,
        atol=1e-4,
    )
