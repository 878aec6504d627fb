"""Quantize and dequantize: bit-exact in half precision, compiled or not, alone or inside a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from exl2jax.ops import dequantize, half_scale, quantize
from exl2jax.ops.rounding import to_half
from exl2jax.qparams import FORMAT_BITS
from tests.oracles import rounding as oracle

EVERY_HALF = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
"""Zero and all positive finite halves, the 1023 subnormal ones first."""

INDEX = np.arange(1, 17)


def same_halves(got: jax.Array, expected: np.ndarray) -> bool:
    """The float32 values are exactly these halves, infinities included."""
    return np.array_equal(np.asarray(got), expected.astype(np.float32))


def bits_of(width: int) -> jax.Array:
    return jnp.float32(width)


def test_to_half_is_a_float16_round_trip() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(20000) * np.exp2(rng.integers(-30, 16, 20000))).astype(np.float32)
    ties = (EVERY_HALF[:2048].astype(np.float32) + EVERY_HALF[1:2049].astype(np.float32)) / 2
    x = np.concatenate([x, ties, -ties])
    with np.errstate(over="ignore"):
        assert same_halves(jax.jit(to_half)(x), x.astype(np.float16))


def test_to_half_bounds_the_bits() -> None:
    """The bound keeps XLA for CUDA from dropping the rounding; with it a positive NaN becomes infinite."""
    assert np.isposinf(jax.jit(to_half)(jnp.float32(np.nan)))
    assert not np.isfinite(jax.jit(to_half)(jnp.float32(-np.nan)))
    assert np.isneginf(jax.jit(to_half)(jnp.float32(-np.inf)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_half_scale_of_every_maximum_and_index(dtype: type) -> None:
    got = jax.jit(half_scale)(EVERY_HALF.astype(dtype)[:, None], INDEX.astype(np.uint8)[None, :])
    with np.errstate(over="ignore"):
        assert same_halves(got, oracle.half_scale(EVERY_HALF[:, None], INDEX[None, :]))


def test_half_scale_rounds_a_maximum_that_is_none_yet() -> None:
    """A maximum cast within the same compilation may arrive as it was before the cast."""
    maxima = np.random.default_rng(1).uniform(1e-4, 2, 500).astype(np.float32)
    expected = half_scale(jnp.asarray(maxima.astype(np.float16)), jnp.uint8(13))
    assert np.array_equal(half_scale(jnp.asarray(maxima), jnp.uint8(13)), expected)


@pytest.mark.parametrize("bits", FORMAT_BITS)
def test_dequantize_of_every_code_and_scale(bits: int) -> None:
    codes = np.arange(2**bits, dtype=np.uint8)
    got = jax.jit(dequantize)(codes[:, None], EVERY_HALF.astype(np.float32)[None, :], bits_of(bits))
    assert same_halves(got, oracle.dequantize(codes[:, None], EVERY_HALF[None, :], bits))


@pytest.mark.parametrize("bits", FORMAT_BITS)
def test_exact_inside_a_compiled_loop(bits: int) -> None:
    """Where a compiler could fuse the conversions away: maximum, index and code meet in one loop body."""
    maxima = EVERY_HALF[:: 7 if bits == 8 else 3]
    codes = np.arange(2**bits, dtype=np.uint8)

    @jax.jit
    def walk(maxima: jax.Array, codes: jax.Array, width: jax.Array) -> jax.Array:
        def body(i: jax.Array, total: jax.Array) -> jax.Array:
            scale = half_scale(maxima, jnp.full(maxima.shape, i + 1, jnp.uint8))
            return total.at[i].set(dequantize(codes[:, None], scale[None, :], width))

        return lax.fori_loop(0, 16, body, jnp.zeros((16, codes.shape[0], maxima.shape[0])))

    got = walk(maxima, codes, bits_of(bits))
    scale = oracle.half_scale(maxima[None, :], INDEX[:, None])
    assert (scale[scale > 0] < np.finfo(np.float16).tiny).any(), "the scales should reach into the subnormals"
    assert same_halves(got, oracle.dequantize(codes[None, :, None], scale[:, None, :], bits))


@pytest.mark.parametrize("bits", FORMAT_BITS)
def test_quantize_against_the_formula(bits: int) -> None:
    rng = np.random.default_rng(bits)
    scale = oracle.half_scale(np.float16(0.9) * rng.random(300).astype(np.float16), rng.integers(1, 17, 300))
    w = (rng.standard_normal((64, 300)) * 0.6 * 2**bits * scale.astype(np.float64)).astype(np.float32)
    got = jax.jit(quantize)(w, scale.astype(np.float32), bits_of(bits))
    expected = oracle.quantize(w, scale, bits)
    steps = np.divide(w, scale, dtype=np.float64, out=np.zeros(w.shape), where=scale > 0)
    away_from_ties = np.abs(steps - np.floor(steps) - 0.5) > 1e-4
    assert np.array_equal(np.asarray(got)[away_from_ties], expected[away_from_ties])
    assert np.abs(np.asarray(got) - expected).max() <= 1
    assert {0, 2**bits - 1} <= set(np.unique(got).astype(int)), "both clamps should be met"


@pytest.mark.parametrize("bits", FORMAT_BITS)
def test_codes_survive_their_own_dequantization(bits: int) -> None:
    codes = np.arange(2**bits, dtype=np.uint8)[:, None]
    scale = EVERY_HALF[1:20000:13].astype(np.float32)[None, :]
    back = quantize(dequantize(codes, jnp.asarray(scale), bits_of(bits)), jnp.asarray(scale), bits_of(bits))
    assert np.array_equal(np.asarray(back), np.broadcast_to(codes, back.shape))


def test_ties_go_to_the_even_code() -> None:
    steps = jnp.asarray([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(steps, jnp.float32(1), bits_of(4)).tolist() == [6, 6, 8, 8, 10, 10]


def test_a_zero_scale_gives_the_zero_code() -> None:
    codes = quantize(jnp.asarray([-1.0, 0.0, 5.0]), jnp.float32(0), bits_of(3))
    assert codes.tolist() == [4, 4, 4]
    assert dequantize(codes, jnp.float32(0), bits_of(3)).tolist() == [0, 0, 0]


def test_all_three_map_over_a_leading_axis() -> None:
    rng = np.random.default_rng(1)
    widths = jnp.asarray(FORMAT_BITS, jnp.float32)
    maxima = rng.random(6).astype(np.float16)
    index = rng.integers(1, 17, (6, 10)).astype(np.uint8)
    w = rng.standard_normal((6, 32, 10)).astype(np.float32) / 50
    scale = jax.vmap(half_scale)(jnp.asarray(maxima), jnp.asarray(index))
    codes = jax.vmap(quantize)(jnp.asarray(w), scale, widths)
    values = jax.vmap(dequantize)(codes, scale, widths)
    for i, bits in enumerate(FORMAT_BITS):
        expected = oracle.half_scale(maxima[i], index[i])
        assert same_halves(scale[i], expected)
        assert np.abs(np.asarray(codes[i]) - oracle.quantize(w[i], expected, bits)).max() <= 1
        assert same_halves(values[i], oracle.dequantize(np.asarray(codes[i]), expected, bits))


@settings(deadline=None)
@given(st.floats(-1e4, 1e4, width=32), st.integers(1, 0x7BFF), st.sampled_from(FORMAT_BITS))
def test_codes_stay_in_range_and_errors_within_half_a_step(value: float, half: int, bits: int) -> None:
    scale = float(np.uint16(half).view(np.float16))
    code = float(quantize(jnp.float32(value), jnp.float32(scale), bits_of(bits)))
    assert 0 <= code <= 2**bits - 1
    steps = value / scale
    if -(2 ** (bits - 1)) <= steps <= 2 ** (bits - 1) - 1:
        assert abs(code - 2 ** (bits - 1) - steps) <= 0.5 + 1e-5
