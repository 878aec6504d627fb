"""Transposes and the search for NaN and infinity, against NumPy's own."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl2jax.storage.arrays import all_finite, transposed

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (128, 3), (300, 77), (129, 256)])
def test_the_transpose_is_contiguous_and_exact(dtype: type, shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(1).normal(size=shape).astype(dtype)
    found = transposed(matrix)
    assert found.flags.c_contiguous and found.dtype == matrix.dtype
    assert found.tobytes() == matrix.T.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@given(bits=st.lists(st.integers(0, 2**32 - 1), max_size=8))
def test_every_pattern_of_bits_is_judged_as_numpy_does(dtype: type, bits: list[int]) -> None:
    size = np.dtype(dtype).itemsize
    values = np.asarray([b % 2 ** (8 * size) for b in bits], f"u{size}").view(dtype)
    with np.errstate(invalid="ignore"):  # the cast warns of signalling NaN
        wide = values.astype(np.float64)
    assert all_finite(values) == all(np.isfinite(v) for v in wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_is_found(dtype: type, bad: float) -> None:
    values = np.ones((40, 50), dtype)
    assert all_finite(values)
    values[17, 3] = bad
    assert not all_finite(values)
